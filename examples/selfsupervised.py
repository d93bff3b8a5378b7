"""Pretrain a tiny network without labels, and look at what its three tasks show it.

python examples/selfsupervised.py
"""

import argparse
import csv
from pathlib import Path

import matplotlib
import torch

from cartl_hub import (
    DataArguments,
    ImagePolicy,
    Jigsaw,
    MultiTask,
    Rotation,
    Schedule,
    SimCLR,
    TrainingArguments,
    Views,
    create_model,
    load_splits,
    save_model,
    train,
)
from cartl_hub.methods.jigsaw import permutations
from cartl_hub.quickstart import digits
from cartl_hub.randomness import image_keys

matplotlib.use("agg")
from matplotlib import pyplot

STEPS = 60
SHOWN = 8  # images in the picture

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--max-steps", type=int, default=STEPS)
parser.add_argument("--output", type=Path, default=Path("runs/selfsupervised"))
options = parser.parse_args()

simclr = SimCLR(views=Views(min_area=0.3, flip=False))  # a mirrored digit is no digit
rotation, jigsaw = Rotation(augmentation=None), Jigsaw(grid=2, augmentation=None)
method = MultiTask(tasks=(simclr, rotation, jigsaw), weights=(1.0, 0.5, 0.5))

splits = load_splits(digits(), ImagePolicy(size=(16, 16)), DataArguments(id="sklearn_digits"))
model = create_model("wrn10_1", num_classes=len(splits.label_names))
model.label_names, model.image_policy = splits.label_names, splits.train.policy

# What the network is shown, and what it should answer

indices = torch.arange(SHOWN)
images, keys = splits.train.get(indices).float() / 255, image_keys(0, 0, indices)
first, second = simclr.pose(images, keys)[0].chunk(2)
turned, turns = rotation.pose(images, keys)
puzzles, answers = jigsaw.pose(images, keys)
orders = permutations(jigsaw.grid**2, jigsaw.num_permutations)[answers]
rows = {
    "image": (images, [""] * SHOWN),
    "view 1": (first, [""] * SHOWN),
    "view 2": (second, [""] * SHOWN),
    "rotation": (turned, [f"{answer}: {90 * answer} degrees" for answer in turns.tolist()]),
    "jigsaw": (puzzles, [f"{answer}: {order}" for answer, order in zip(answers.tolist(), orders.tolist(), strict=True)]),
}
figure, axes = pyplot.subplots(len(rows), SHOWN, figsize=(1.5 * SHOWN, 1.7 * len(rows)), layout="constrained")
for line, (name, (pictures, titles)) in zip(axes, rows.items(), strict=True):
    for panel, picture, title in zip(line, pictures, titles, strict=True):
        panel.imshow(picture.permute(1, 2, 0), vmin=0, vmax=1)
        panel.set_title(title, fontsize=7)
        panel.set(xticks=[], yticks=[])
    line[0].set_ylabel(name)
options.output.mkdir(parents=True, exist_ok=True)
figure.savefig(options.output / "tasks.png", dpi=120)

# Training

train(
    model,
    method,
    splits.train,
    arguments=TrainingArguments(
        max_steps=options.max_steps,
        batch_size=64,
        lr=0.1,
        schedule=Schedule(decay="exponential", gamma=0.1),
        precision="fp32",
        augmentation=None,  # each task draws its own
    ),
    output_dir=options.output,
)
with open(options.output / "losses.csv", newline="") as file:
    losses = [float(row["loss"]) for row in csv.DictReader(file)]
print(f"weighted loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last one of {len(losses)}")
print("what it was shown:", options.output / "tasks.png")
print("source to fine-tune, its classifier untrained:", save_model(model, options.output / "model"))
