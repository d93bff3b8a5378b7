"""What an evaluation costs, beside attack libraries and beside its bare forward and input-gradient passes.

    python benchmarks/cost.py --model model_cards/wrn16_2.fdm4_cifar100 --data ../shared/data/cifar100 \
        --num-images 125 --output benchmarks/results/cost.json

Each attack is measured on two sets of test images: the first ones, of which the source withstands a fifth, and the first ones
that it classifies rightly, of which it withstands about a half. Ours is all of ``evaluate``: reading, clean accuracy, attack,
both verdicts. The libraries' attack is followed by one verdict. "bare" is the physical bound of an attack on every image: as
many forward and input-gradient passes and nothing else, parameters frozen, channels last. Contenders take turns; ratios are
those of the medians. torchattacks comes from ``pip install --no-deps torchattacks==3.5.1``.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from attacks_reference import BATCH_SIZE, EPS, LIBRARIES, classified, hardware, robust, run_toolbox, run_torchattacks
from torch import Tensor

from cartl_hub import APGD, PGD, Classifier, ImageData, evaluate, load_model, load_test_split
from cartl_hub.attacks import Attack
from cartl_hub.config import to_dict

ATTACKS = {"PGD-20": PGD(eps=EPS, step_size=2 / 255, steps=20), "APGD-CE-100": APGD(eps=EPS, steps=100)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of a model")
    parser.add_argument("--data", required=True, help="what load_test_split reads; its test split is used")
    parser.add_argument("--num-images", type=int, default=125, help="of each set")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = load_model(options.model, device=options.device)
    test, _ = load_test_split(options.data, model.image_policy)
    right = classified(model, images_of(test, torch.arange(len(test))), test.labels).nonzero().flatten()
    sets = {"first": torch.arange(options.num_images), "first classified rightly": right[: options.num_images]}
    rows = [
        {"images": name, "attack": to_dict(attack)} | compare(model, test, indices, attack, options.repeats)
        for name, indices in sets.items()
        for attack in ATTACKS.values()
    ]
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "model": options.model,
        "data": options.data,
        "num_images": options.num_images,
        "repeats": options.repeats,
        "batch_size": BATCH_SIZE,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("cartl-hub", "torch", "timm", "numpy", *LIBRARIES)},
        "hardware": hardware(options.device),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def compare(model: Classifier, test: ImageData, indices: Tensor, attack: Attack, repeats: int) -> dict:
    """The row of one attack on one set of images."""
    images, labels = images_of(test, indices), test.labels[indices]
    found: dict[str, Tensor] = {}
    passes = 0

    def ours() -> None:
        nonlocal passes
        data = ImageData(labels, test.label_names, test.get(indices), test.policy)
        report = evaluate(
            model, data, attacks={"attack": attack}, curve=None, checks=False, batch_size=BATCH_SIZE, progress=False
        )
        found["cartl_hub"] = torch.from_numpy(report.verdicts.correct["attack"])
        passes = report.attacks["attack"].passes

    def of(name: str, run: Callable[..., Tensor]) -> Callable[[], None]:
        def attacked() -> None:
            found[name] = robust(model, attack, images, labels, run(model, attack, images, labels, 0))

        return attacked

    contenders = {"bare": lambda: bare_passes(model, images, labels, attack.steps), "cartl_hub": ours}
    if isinstance(attack, PGD):
        contenders["art"] = of("art", run_toolbox)
    contenders["torchattacks"] = of("torchattacks", run_torchattacks)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    clean = classified(model, images, labels)
    row = {
        "clean_acc": float(clean.double().mean()),
        "robust_acc": {name: float((clean & flags).double().mean()) for name, flags in found.items()},
        "seconds": {name: [round(value, 2) for value in times] for name, times in seconds.items()},
        "cost_of_bare": {name: round(value / medians["bare"], 3) for name, value in medians.items()},
        "passes": passes,
        "bare_passes": attack.steps * len(images),
        # what is not a pass of the attack: reading, clean accuracy, second verdict, projections, bookkeeping, small batches
        "cost_of_own_passes": round(medians["cartl_hub"] / medians["bare"] * attack.steps * len(images) / passes, 3),
    }
    print(json.dumps(row), flush=True)
    return row


def bare_passes(model: Classifier, images: Tensor, labels: Tensor, number: int) -> None:
    """Forward and input-gradient passes over all images, and nothing else."""
    model.requires_grad_(False).to(memory_format=torch.channels_last)
    device = next(model.parameters()).device
    for part, classes in zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True):
        pixels, classes = part.to(device).contiguous(memory_format=torch.channels_last).requires_grad_(True), classes.to(device)
        for _ in range(number):
            torch.autograd.grad(F.cross_entropy(model(pixels), classes), pixels)
    if device.type == "cuda":
        torch.cuda.synchronize()
    model.requires_grad_(True).to(memory_format=torch.contiguous_format)


def images_of(data: ImageData, indices: Tensor) -> Tensor:
    """[N, C, H, W] in [0, 1]."""
    return data.get(indices).float() / 255


if __name__ == "__main__":
    main()
