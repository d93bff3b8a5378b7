"""Fine-tune any timm model on any data set: here adversarially, the last blocks, with a radius that grows during the run.

python examples/finetune_timm.py resnet18 uoft-cs/cifar10
python examples/finetune_timm.py test_resnet ../shared/data/svhn_mini --untrained   # without the Hub
"""

import argparse

from cartl_hub import PGD, AdversarialTraining, EpsSchedule, RobustFineTuner, TrainingArguments, create_model

EPS = 4 / 255

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("data")
parser.add_argument("--untrained", action="store_true", help="start from random weights instead of timm's")
parser.add_argument("--num-blocks", type=int, default=4)
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--num-images", type=int)
parser.add_argument("--output", default="runs/finetune_timm")
options = parser.parse_args()

tuner = RobustFineTuner(
    create_model(options.model) if options.untrained else options.model,
    options.data,
    method=AdversarialTraining(
        attack=PGD(eps=EPS, step_size=EPS / 4, steps=5),
        num_blocks=options.num_blocks,
        eps_schedule=EpsSchedule(start=0.25, end=0.75),
    ),
    arguments=TrainingArguments(epochs=options.epochs, optimizer="adamw", lr=1e-3),
    output_dir=options.output,
)
tuner.train()
report = tuner.evaluate(attacks={"PGD-20": PGD(eps=EPS, step_size=EPS / 4, steps=20)}, num_images=options.num_images)
print(f"clean {report.clean.accuracy:.1%}, PGD-20 {report.attacks['PGD-20'].accuracy:.1%}")
tuner.save()
