"""Train a robust source from a recipe that is written here instead of in YAML.

python examples/pretrain_source.py uoft-cs/cifar100 --epochs 20
"""

import argparse

from cartl_hub import FDM, NFGSM, DataArguments, Recipe, Schedule, TrainingArguments, pretrain
from cartl_hub.recipe import RecipeData

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("data")
parser.add_argument("--architecture", default="wrn16_2")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--num-images", type=int)
parser.add_argument("--label-column")
parser.add_argument("--output", default="runs/pretrain_source")
options = parser.parse_args()

recipe = Recipe(
    id=f"{options.architecture}.fdm4_example",
    title="An example of a robust source.",
    architecture=options.architecture,
    data=RecipeData(
        id=options.data, local=options.data, read=DataArguments(validation_share=0.02, label_column=options.label_column)
    ),
    method=FDM(num_blocks=4, attack=NFGSM(eps=8 / 255)),
    training=TrainingArguments(epochs=options.epochs, lr=0.2, schedule=Schedule(warmup=0.3), ema=0.999),
)
folder = pretrain(recipe, f"{options.output}/model", output_dir=options.output, num_images=options.num_images)
print("model, card and report:", folder)
