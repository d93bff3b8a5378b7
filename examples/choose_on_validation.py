"""Choose the number of blocks and NEFT's bound on validation images under attack, then report on the test images, once.

python examples/choose_on_validation.py my_photos --num-blocks 2 4 --betas 0.4 1.0
"""

import argparse
from itertools import product
from pathlib import Path

from cartl_hub import NEFT, RobustFineTuner, TrainingArguments, load_model, load_splits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="my_photos/cat/1.jpg, my_photos/dog/2.jpg, ...")
parser.add_argument("--source", default="wrn16_2.fdm4_cifar100")
parser.add_argument("--num-blocks", type=int, nargs="+", default=[2, 4, 6])
parser.add_argument("--betas", type=float, nargs="+", default=[0.4, 0.6, 1.0])
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--num-images", type=int, help="test images of the report; all by default")
parser.add_argument("--output", type=Path, default=Path("runs/choose"))
options = parser.parse_args()

splits = load_splits(options.folder, load_model(options.source).image_policy)  # the same images for every candidate
candidates = [
    RobustFineTuner(
        options.source,
        splits,
        method=NEFT(num_blocks=num_blocks, beta=beta),
        arguments=TrainingArguments(epochs=options.epochs, validate_every=options.epochs),
        output_dir=options.output / f"blocks{num_blocks}_beta{beta}",
    )
    for num_blocks, beta in product(options.num_blocks, options.betas)
]
found = []
for tuner in candidates:
    validation = tuner.train().validations[-1]
    found.append(validation.order)  # robust accuracy, then clean accuracy
    print(f"{tuner.method}: clean {validation.clean_acc:.1%}, robust {validation.robust_acc:.1%} on validation images")

chosen = candidates[found.index(max(found))]
report = chosen.evaluate(num_images=options.num_images)
print(f"chosen: {chosen.method}")
print(f"test images: clean {report.clean.accuracy:.1%}, robust {report.robust.accuracy:.1%}; model: {chosen.save()}")
