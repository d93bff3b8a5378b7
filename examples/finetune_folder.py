"""Fine-tune the bundled robust source on your own folder of images, one folder per class.

python examples/finetune_folder.py my_photos
"""

import argparse

from cartl_hub import NEFT, BatchNormPolicy, RobustFineTuner, TrainingArguments

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="my_photos/cat/1.jpg, my_photos/dog/2.jpg, ...")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--num-images", type=int, help="test images of the report; all by default")
parser.add_argument("--output", default="runs/finetune_folder")
options = parser.parse_args()

tuner = RobustFineTuner(
    "wrn16_2.fdm4_cifar100",
    options.folder,
    method=NEFT(num_blocks=4, beta=0.4),
    bn=BatchNormPolicy(extractor_statistics="source", submodel_affine="frozen"),
    arguments=TrainingArguments(epochs=options.epochs),
    output_dir=options.output,
)
tuner.train()
report = tuner.evaluate(num_images=options.num_images)
print(f"clean {report.clean.accuracy:.1%}, PGD-100 {report.attacks['PGD-100'].accuracy:.1%}")
print("model, card and report:", tuner.save())
