"""Measure any torch module that maps images in [0, 1] to logits; it need not come from this package.

python examples/evaluate_any_model.py
"""

import argparse

import torch
from torch import nn

from cartl_hub import ImagePolicy, default_attacks, evaluate, load_splits
from cartl_hub.quickstart import digits

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--num-images", type=int)
parser.add_argument("--output", default="runs/evaluate_any_model")
options = parser.parse_args()

splits = load_splits(digits(), ImagePolicy(size=(8, 8), mode="L"))

torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for batch in splits.train.training_batches(batch_size=128, seed=0, start=0, stop=200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch.images.float() / 255), batch.labels).backward()
    optimizer.step()

report = evaluate(model.eval(), splits.test, attacks=default_attacks(eps=16 / 255), num_images=options.num_images)
report.save(options.output)
print(f"clean {report.clean.accuracy:.1%}, PGD-100 at 16/255 {report.attacks['PGD-100'].accuracy:.1%}")
