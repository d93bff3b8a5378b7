"""What a step of source training costs, beside a plain loop.

    python benchmarks/training_step.py --architecture wrn16_2 --data ../shared/data/cifar100 --batch-size 64 \\
        --output benchmarks/results/training_step.json

"reference" is the loop as it is usually written, and as the CARTL authors' is: contiguous memory, parameters that require a
gradient during the attack, a forward pass for the adversarial and one for the clean images. "ours" is a whole step of
``cartl_hub.train`` (drawing, augmentation, attack, passes, optimiser, average of the weights), channels last, in fp32 and, with
``--bf16``, under bf16 autocast; "ours, contiguous" is the same without channels last. Contenders take turns, times are medians of
whole steps, ratios are to the reference. "compiled" (``--compile``) is ours on a model whose forward went through torch.compile.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from cartl_hub import FDM, NFGSM, PGD, AdversarialTraining, ImageData, Method, TrainingArguments, create_model, load_test_split
from cartl_hub.attacks import Attack
from cartl_hub.blocks import list_blocks
from cartl_hub.training import loop, train

EPS = 8 / 255
SPLIT = 4
ATTACKS: dict[str, Attack] = {"N-FGSM": NFGSM(eps=EPS), "PGD-7": PGD(eps=EPS, step_size=2 / 255, steps=7)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="wrn16_2")
    parser.add_argument("--data", required=True, help="what load_test_split reads; nothing but time is measured on it")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--repeats", type=int, default=5, help="steps of each, after one that isn't counted")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()

    if options.threads:
        torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = create_model(options.architecture, num_classes=100)
    data, _ = load_test_split(options.data, model.image_policy)
    assert isinstance(data, ImageData)
    data = data.subset(range(4 * options.batch_size))
    arguments = TrainingArguments(
        max_steps=1, batch_size=options.batch_size, lr=0.01, ema=0.999, precision="fp32", validation_attack=None
    )
    rows = []
    for name in options.attacks:
        for method in (AdversarialTraining(attack=ATTACKS[name]), FDM(num_blocks=SPLIT, attack=ATTACKS[name])):
            contenders: dict[str, Callable[[], float]] = {
                "reference": reference(options.architecture, method, data, options.batch_size, device),
                "ours": ours(options.architecture, method, data, arguments),
                "ours, contiguous": ours(options.architecture, method, data, replace(arguments, channels_last=False)),
            }
            if options.bf16:
                contenders["ours, bf16"] = ours(options.architecture, method, data, replace(arguments, precision="bf16"))
            if options.compile:
                contenders["ours, compiled"] = ours(options.architecture, method, data, arguments, compiled=True)
            seconds: dict[str, list[float]] = {contender: [] for contender in contenders}
            for _ in range(options.repeats + 1):
                for contender, step in contenders.items():
                    seconds[contender].append(step())
            medians = {contender: statistics.median(values[1:]) for contender, values in seconds.items()}
            row = {
                "method": type(method).__name__,
                "attack": name,
                "seconds": {contender: round(median, 4) for contender, median in medians.items()},
                "ratio": {contender: round(median / medians["reference"], 3) for contender, median in medians.items()},
                "images_per_second": {contender: round(options.batch_size / median, 1) for contender, median in medians.items()},
            }
            rows.append(row)
            print(f"{row['method']} with {name}: ratio to the reference {row['ratio']}, images/s {row['images_per_second']}")
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "architecture": options.architecture,
        "batch_size": options.batch_size,
        "repeats": options.repeats,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("cartl-hub", "torch", "timm")}},
        "hardware": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")


def synchronised(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(
    architecture: str, method: Method, data: ImageData, arguments: TrainingArguments, *, compiled: bool = False
) -> Callable[[], float]:
    """Seconds of one step of ``train``, without what a run does once."""

    def step() -> float:
        model, seconds, whole = create_model(architecture, num_classes=100), [], loop._Run._step
        if compiled:
            model.backbone.compile()

        def timed(self: loop._Run, *args: object) -> None:
            begun = synchronised(self.accelerator.device.type)
            whole(self, *args)
            seconds.append(synchronised(self.accelerator.device.type) - begun)

        loop._Run._step = timed  # type: ignore[method-assign]
        try:
            train(model, method, data, arguments=arguments)
        finally:
            loop._Run._step = whole  # type: ignore[method-assign]
        return seconds[-1]

    return step


def reference(architecture: str, method: Method, data: ImageData, batch_size: int, device: str) -> Callable[[], float]:
    """Seconds of one step of a plain loop."""
    model = create_model(architecture, num_classes=100).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    attack = method.attack  # type: ignore[attr-defined]
    first = next(iter(list_blocks(model)[-SPLIT].modules.values()))
    kept: list[torch.Tensor] = []
    if isinstance(method, FDM):
        first.register_forward_pre_hook(lambda module, args: kept.append(args[0]))

    def adversarial(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        single = isinstance(attack, NFGSM)
        reach, size, steps = (2 * EPS, EPS, 1) if single else (EPS, attack.step_size, attack.steps)
        changed = images + torch.empty_like(images).uniform_(-reach, reach)
        for _ in range(steps):
            changed = changed.detach().requires_grad_()
            loss = F.cross_entropy(model(changed), labels)
            loss.backward()
            changed = changed + size * changed.grad.sign()
            if not single:
                changed = images + (changed - images).clamp(-EPS, EPS)
            changed = changed.clamp(0, 1)
        return changed.detach()

    def step() -> float:
        begun = synchronised(device)
        images, labels = data.get(torch.arange(batch_size)).to(device).float() / 255, data.labels[:batch_size].to(device)
        model.eval()
        changed = adversarial(images, labels)
        model.train()
        optimizer.zero_grad()
        kept.clear()
        loss = F.cross_entropy(model(changed), labels)
        if isinstance(method, FDM):
            model(images)
            difference = (kept[1] - kept[0]).flatten(1)
            loss = loss + method.weight * difference.norm(dim=1).mean() / difference.shape[1] ** 0.5
        loss.backward()
        optimizer.step()
        return synchronised(device) - begun

    return step


if __name__ == "__main__":
    main()
