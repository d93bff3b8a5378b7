"""Our attacks beside those of other libraries: same model, images, steps, step sizes and queries.

    python benchmarks/attacks_reference.py --model model_cards/wrn16_2.fdm4_cifar100 --data ../shared/data/cifar100 \
        --num-images 1000 --output benchmarks/results/attacks_reference.json

FGSM and PGD stand beside the Adversarial Robustness Toolbox (in the ``test`` extra), Auto-PGD and Square beside torchattacks,
which carries the code of their authors: ``pip install --no-deps torchattacks==3.5.1``, as it pins an old version of requests. Its
targeted Auto-PGD has no row in L2, where it takes the step size of the first image of a batch for all of them.

An image counts as robust if it is classified rightly as it is and after the attack, whoever made the attack. Rows are saved as
they come; a second call goes on where the first one stopped.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchattacks
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

from cartl_hub import load_model
from cartl_hub.attacks import APGD, APGDT, FABT, FGSM, PGD, Attack, Square
from cartl_hub.config import to_dict
from cartl_hub.loading import load_splits
from cartl_hub.randomness import image_keys

EPS, L2_EPS = 8 / 255, 0.5
ATTACKS = {
    "FGSM": FGSM(eps=EPS),
    "PGD-20": PGD(eps=EPS, step_size=2 / 255, steps=20),
    "PGD-20 L2": PGD(eps=L2_EPS, step_size=0.0625, steps=20, norm="L2"),
    "APGD-CE": APGD(eps=EPS, steps=50),
    "APGD-CE L2": APGD(eps=L2_EPS, steps=50, norm="L2"),
    "APGD-DLR": APGD(eps=EPS, steps=50, loss="dlr"),
    "APGD-DLR L2": APGD(eps=L2_EPS, steps=50, loss="dlr", norm="L2"),
    "APGD-T": APGDT(eps=EPS, steps=20),
    "FAB-T": FABT(eps=EPS, steps=20),
    "FAB-T L2": FABT(eps=L2_EPS, steps=20, norm="L2"),
    "Square": Square(eps=EPS, queries=1000),
    "Square L2": Square(eps=L2_EPS, queries=1000, norm="L2"),
}
BATCH_SIZE = 125
ROUNDING = 1e-5  # of norms and pixels, in fp32
LIBRARIES = ("adversarial-robustness-toolbox", "torchattacks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or id of a model")
    parser.add_argument("--data", required=True, help="what load_splits reads; its test split is used")
    parser.add_argument("--num-images", type=int, default=1000, help="the first images of the test split")
    parser.add_argument("--seed", type=int, default=0, help="of the random starts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = load_model(arguments.model).to(arguments.device)
    data = load_splits(arguments.data, model.image_policy).test
    if tuple(data.label_names) != tuple(model.label_names):
        raise SystemExit(f"expected data with the classes of {arguments.model}, got the classes of {arguments.data}.")
    indices = torch.arange(min(arguments.num_images, len(data)))
    images, labels = data.get(indices).float() / 255, data.labels[indices]

    clean = classified(model, images, labels)
    print(f"{len(indices)} images, clean accuracy {share(clean):.1%}")
    report = {
        "model": arguments.model,
        "data": arguments.data,
        "split": data.description,
        "num_images": len(indices),
        "seed": arguments.seed,
        "batch_size": BATCH_SIZE,
        "clean_acc": share(clean),
        "clean": digits(clean),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("cartl-hub", "torch", "timm", "numpy", *LIBRARIES)},
        "hardware": hardware(arguments.device),
        "command": shlex.join(["python", *sys.argv]),
    }
    results = saved_rows(arguments.output, report)
    for name, attack in ATTACKS.items():
        if results.get(name, {}).get("attack") != to_dict(attack):
            results[name] = compare(model, attack, images, labels, indices, clean, arguments.seed)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report | {"attacks": results}, indent=1) + "\n")
        row = results[name]
        print(f"{name}: robust accuracy {row['robust_acc']:.1%}, reference {row['reference_robust_acc']:.1%}", flush=True)


def saved_rows(path: Path, report: dict) -> dict[str, dict]:
    """Rows of an earlier call on the same model, images and versions."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    rows = saved.pop("attacks")
    return rows if all(saved[key] == report[key] for key in report if key not in ("hardware", "command")) else {}


def compare(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor, indices: Tensor, clean: Tensor, seed: int) -> dict:
    """The row of one attack."""
    begun = time.perf_counter()
    adversarial = run_ours(model, attack, images, labels, image_keys(seed, 0, indices))
    between = time.perf_counter()
    run_theirs = run_toolbox if isinstance(attack, (FGSM, PGD)) else run_torchattacks
    reference = run_theirs(model, attack, images, labels, seed)
    ended = time.perf_counter()
    ours, theirs = (clean & robust(model, attack, images, labels, found) for found in (adversarial, reference))
    return {
        "attack": to_dict(attack),
        "robust_acc": share(ours),
        "reference": LIBRARIES[0] if run_theirs is run_toolbox else LIBRARIES[1],
        "reference_robust_acc": share(theirs),
        "difference_points": round(100 * (share(ours) - share(theirs)), 6),
        "broken_by_ours_only": int((theirs & ~ours).sum()),
        "broken_by_reference_only": int((ours & ~theirs).sum()),
        "seconds": round(between - begun, 1),
        "reference_seconds": round(ended - between, 1),
        "robust": digits(ours),
        "reference_robust": digits(theirs),
    }


def run_ours(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
    """[N, C, H, W] in [0, 1] -> [N, C, H, W]."""
    device = next(model.parameters()).device
    batches = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), keys.split(BATCH_SIZE), strict=True)
    return torch.cat([attack(model, *(part.to(device) for part in batch), until_broken=True).cpu() for batch in batches])


def run_toolbox(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """[N, C, H, W] in [0, 1] -> [N, C, H, W]."""
    np.random.seed(seed)  # noqa: NPY002 (the library draws from it)
    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=len(model.label_names),
        clip_values=(0.0, 1.0),
        device_type="gpu" if next(model.parameters()).is_cuda else "cpu",
    )
    shared = {"norm": np.inf if attack.norm == "Linf" else 2, "eps": attack.eps, "batch_size": BATCH_SIZE}
    if isinstance(attack, PGD):
        starts = int(attack.random_start)
        search = ProjectedGradientDescent(
            classifier, eps_step=attack.step_size, max_iter=attack.steps, num_random_init=starts, verbose=False, **shared
        )
    else:
        search = FastGradientMethod(classifier, **shared)
    return torch.from_numpy(search.generate(images.numpy(), labels.numpy()))


def run_torchattacks(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """[N, C, H, W] in [0, 1] -> [N, C, H, W]."""
    device = next(model.parameters()).device
    shared = {"norm": attack.norm, "eps": attack.eps, "seed": seed}
    if isinstance(attack, Square):
        search = torchattacks.Square(model, n_queries=attack.queries - 1, p_init=attack.p_init, **shared)  # beside the first one
    elif isinstance(attack, APGDT):
        search = torchattacks.APGDT(model, steps=attack.steps, n_classes=attack.num_targets + 1, **shared)
    elif isinstance(attack, FABT):
        search = torchattacks.FAB(model, steps=attack.steps, n_classes=attack.num_targets + 1, multi_targeted=True, **shared)
    elif isinstance(attack, PGD):
        search = torchattacks.PGD(model, eps=attack.eps, alpha=attack.step_size, steps=attack.steps)
    else:
        search = torchattacks.APGD(model, steps=attack.steps, loss=attack.loss, **shared)
    batches = zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)
    return torch.cat([search(*(part.to(device) for part in batch)).detach().cpu() for batch in batches])


def robust(model: nn.Module, attack: Attack, images: Tensor, labels: Tensor, adversarial: Tensor) -> Tensor:
    """Whether each image is classified rightly after an attack, which has kept to its ball: [N], bool."""
    size = (adversarial - images).flatten(1).norm(p=torch.inf if attack.norm == "Linf" else 2, dim=1).max()
    if size > attack.eps + ROUNDING or adversarial.min() < -ROUNDING or adversarial.max() > 1 + ROUNDING:
        raise SystemExit(f"expected perturbations up to {attack.eps:.4g} and pixels in [0, 1], got {size:.4g}.")
    return classified(model, adversarial, labels)


@torch.inference_mode()
def classified(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified rightly: [N], bool."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(BATCH_SIZE)]) == labels


def share(flags: Tensor) -> float:
    return round(float(flags.double().mean()), 6)


def digits(flags: Tensor) -> str:
    return "".join(str(int(flag)) for flag in flags)


def hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    main()
