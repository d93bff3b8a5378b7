"""The field's robust checkpoints as models of this package.

A checkpoint says little about its network: leaky or plain ReLU, what a shortcut reads, and which constants normalise the input
leave no trace in the names and shapes of its weights. What the file shows is read and checked; the rest is declared, and nothing
is guessed: a wrong guess would cost accuracy without an error.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg_value
from torch import Tensor

from ..files import sha256
from ..models import Classifier, create_model
from ..models.settings import LARGEST, check_model_args
from ..ranges import check_whole
from ..report import threat_text
from .layouts import CARTL_RESNET, CIFAR, LAYOUTS, PREACT, TORCHVISION, WIDE, Network, created, is_at, original_name, recognise
from .reading import CheckpointError, find_weights, listed, read_file

Format = Literal["auto", "robustness", "cartl", "robustbench", "timm"]

_FORMATS = {
    "robustness": (TORCHVISION, CIFAR),
    "cartl": (WIDE, CARTL_RESNET),
    "robustbench": (WIDE, CIFAR, PREACT, TORCHVISION),
    "timm": (TORCHVISION,),
}
_LARGEST_STD = 1000.0
_SHOWN = 12  # names of entries for one reason, in a summary
_CONSTANTS = (("new_mean", "new_std"), ("mu", "sigma"), ("mean", "std"))


@dataclass(frozen=True, eq=False)
class Imported:
    """A checkpoint as a model of this package.

    Args:
        model: Model in eval mode; its origin is in its lineage.
        format: Format of the checkpoint.
        dropped: Each entry of the file that isn't a weight of the model, with the reason.
        created: Entries that the file lacks: step counters of batch norm, which PyTorch did not have before 0.4.1.
    """

    model: Classifier
    format: str
    dropped: tuple[tuple[str, str], ...]
    created: tuple[str, ...]

    def __str__(self) -> str:
        mean, std = (listed(f"{value:.4g}" for value in part.flatten().tolist()) for part in (self.model.mean, self.model.std))
        policy, threat = self.model.image_policy, self.model.lineage.get("threat_model")
        height, width = policy.size
        lines = [
            f"{self.model.architecture} with {self.model.num_classes} classes, from format {self.format}",
            f"input: {height}x{width} {policy.mode}, in [0, 1]; normalisation inside: mean {mean}; std {std}",
            "threat model it was trained for: "
            + (
                "not stated, say it with norm and eps (--norm, --eps)"
                if threat is None
                else threat_text(threat["norm"], threat["eps"])
            ),
        ]
        for reason, count in Counter(reason for _, reason in self.dropped).items():
            names = [name for name, why in self.dropped if why == reason]
            more = f" and {count - _SHOWN} more" if count > _SHOWN else ""
            lines.append(f"dropped, {reason}: {listed(names[:_SHOWN])}{more}")
        return "\n".join(lines + ([f"created: {len(self.created)} (step counters of batch norm)"] if self.created else []))


def import_checkpoint(
    path: str | Path,
    *,
    format: Format = "auto",
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    input_size: int | tuple[int, int] | None = None,
    label_names: Sequence[str] | None = None,
    entry: str | None = None,
    norm: Literal["Linf", "L2"] | None = None,
    eps: float | None = None,
    license: str | None = None,
    url: str | None = None,
) -> Imported:
    """Import a robust checkpoint of another project as a model that takes images in [0, 1].

    Each entry of the file is mapped, or listed with the reason why it isn't; weights become fp32. Formats:

    - robustness: MadryLab's library and the ImageNet models made with it (Salman et al., 2020): torchvision's ResNets, and
      ResNets for CIFAR. Its WRN-50-4 is ``architecture="resnet50", model_args={"base_width": 256}``.
    - cartl: CARTL's WRNs (leaky ReLU of 0.1) and ResNets. Those of its NEFT have convex residual sums in the last k blocks:
      ``model_args={"convex_blocks": k}``.
    - robustbench: WRNs of TRADES and RobustBench (ReLU), ResNets and PreActResNet-18 for CIFAR, torchvision's ResNets.
    - timm: timm's names; ResNets are recognised, others need ``architecture``.
    - auto: found from the names. The WRNs of cartl and robustbench share theirs and have to be told apart.

    A network that does more to its input than to subtract and divide by constants (MMA's: by each image's own), or that changes
    its logits, isn't the one imported here: compare accuracies after the import.

    Args:
        path: Safetensors file, or a file that ``torch.save`` wrote; no code in a pickle is run.
        format: Format of the file.
        architecture: Name of the architecture in timm; inferred from the shapes if they show it, and checked against them.
        model_args: Arguments of the architecture that can't be inferred from the weights: ``negative_slope`` and
            ``convex_blocks`` of a WRN, ``activated_shortcut`` of a PreActResNet.
        num_classes: Expected number of classes; verified.
        mean: Mean of the normalisation, for pixels in [0, 1], per channel; needed if the file holds none, checked if it does.
        std: Standard deviation, as ``mean``. A mean of 0 and a std of 1 are for a network that takes [0, 1] itself.
        input_size: Height and width of the input, in pixels; by default the architecture's, 32 or 224. Pictures are resized to
            just cover it; if it isn't given, ImageNet's ResNets take the middle 224 pixels of 256, as their accuracies do.
        label_names: Name of each class.
        entry: Entry of the file that holds the weights, if several do, e.g. "last" or "best".
        norm: Norm of the threat model, for the lineage.
        eps: Radius of the threat model, in pixel units of [0, 1].
        license: License of the weights, e.g. "mit".
        url: Address of the file.

    Raises:
        CheckpointError: If the file can't be read, has surplus or missing entries, or doesn't show what isn't declared.
        ValueError: On an unknown format, a threat model or an input size out of range, or arguments of the architecture that name
            weights.
    """
    path, args = Path(path), dict(model_args or {})
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}.")
    threat_model = _threat_model(norm, eps)
    check_model_args(args)
    if input_size is not None:
        for side in input_size if isinstance(input_size, (tuple, list)) else (input_size,):
            check_whole("input_size", side, (">=", 1), ("<=", LARGEST))
    if isinstance(label_names, str):
        raise ValueError(f"label_names must be a list, one name for each class, got {label_names!r}.")
    with _named(path):
        state, beside = find_weights(read_file(path), entry)
        network = recognise(state, architecture, args)
        format = _format(format, network, args)
        name, args = _architecture(network, format, architecture, args)
        stem = network.shapes.get(f"{get_pretrained_cfg_value(name, 'first_conv')}.weight", ())
        in_chans = 1 if stem[1:2] == (1,) else 3
        constants = _constants(network, in_chans)
        normalisation = _normalisation([(state[first], state[second]) for first, second in constants], mean, std, in_chans)
        torchvisions = network.layout in LAYOUTS or format == "robustness"
        model = _build(network, name, args, num_classes, in_chans, input_size, normalisation, license, torchvisions)
        if label_names is not None and not len(label_names) == len(set(label_names)) == model.num_classes:
            raise CheckpointError(
                f"expected {model.num_classes} different label names, one for each class, got {len(set(label_names))}."
            )
        reasons, counters = _account(network, constants, model)
    weights = {new: state[old] for new, old in network.mapped.items()}
    model.backbone.load_state_dict(weights | {counter: torch.tensor(0) for counter in counters})
    model.label_names = None if label_names is None else tuple(map(str, label_names))
    dropped = (*((other, "beside the weights") for other in beside), *reasons.items())
    origin = {
        "file": path.name,
        "sha256": sha256(path),
        "format": format,
        "num_dropped": len(dropped),
        "entry": entry,
        "url": url,
    }
    model.lineage = {
        "source": None,
        "threat_model": threat_model,
        **({} if license is None else {"license": license}),
        "imported": {key: value for key, value in origin.items() if value is not None},
    }
    return Imported(model.eval(), format, dropped, counters)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Prefix an error with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _threat_model(norm: str | None, eps: float | None) -> dict[str, Any] | None:
    if norm is None and eps is None:
        return None
    if norm not in ("Linf", "L2") or eps is None or not 0 < eps < math.inf:
        raise ValueError(f"expected norm 'Linf' or 'L2' with a radius eps > 0 in pixel units of [0, 1], got {norm!r} and {eps}.")
    if norm == "Linf" and eps > 1:
        raise ValueError(f"eps must be in (0, 1] for Linf, as pixels are; got {eps}. Did you mean {eps:g}/255?")
    return {"norm": norm, "eps": float(eps)}


# What the network is


def _format(declared: Format, network: Network, args: Mapping[str, Any]) -> Format:
    """The declared format, checked, or the one that the names show."""
    layout, prefix, names = network.layout, network.prefix, network.state
    foreign = layout in LAYOUTS
    if declared != "auto":
        if layout in _FORMATS[declared] or (not foreign and declared != "cartl"):
            return declared
        fitting = [name for name, layouts in _FORMATS.items() if layout in layouts] or ["timm"]
        raise CheckpointError(f"expected format {declared!r}, got a {layout.name}; pass {' or '.join(fitting)} as format.")
    if layout is WIDE:
        if "negative_slope" in args:
            return "cartl" if args["negative_slope"] else "robustbench"
        if any(name.startswith(f"{prefix}{WIDE.unused}") for name in names):
            return "robustbench"
        raise CheckpointError(
            "expected to be told the activation of the WRN, which its weights don't show; pass format='cartl' (leaky ReLU of "
            "0.1) or format='robustbench' (ReLU; also for TRADES), in the shell --format."
        )
    if any("attacker" in name.split(".") or is_at(name, "normalizer.new_mean") for name in names):
        return "robustness"
    if layout in (CIFAR, PREACT):
        return "robustbench"
    return "cartl" if layout is CARTL_RESNET else "timm"


def _architecture(network: Network, format: Format, declared: str | None, args: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments: those that shapes show, and those that were declared."""
    found, shown = network.layout.infer(network.shapes)
    name = declared or found
    if network.layout is WIDE and format == "cartl":
        shown = {"negative_slope": 0.1}
    if network.layout not in LAYOUTS and re.match(r"wrn\d", str(name)) and "negative_slope" not in args:
        raise CheckpointError(
            "expected to be told the activation of the WRN, which its weights don't show; pass "
            "model_args={'negative_slope': 0.0} (ReLU) or 0.1 (leaky), in the shell --model-arg negative_slope=0.0. What "
            "save_model wrote is read by load_model."
        )
    if (network.layout is PREACT or name == "preact_resnet18") and "activated_shortcut" not in args:
        raise CheckpointError(
            "expected to be told what the shortcut convolutions of the PreActResNet read, which its weights don't show; pass "
            "model_args={'activated_shortcut': True} (He et al., Rice et al., Kireev et al.: the activated input) or False "
            "(Wong et al., Andriushchenko and Flammarion: the raw one), in the shell --model-arg activated_shortcut=true."
        )
    if name is None or not timm.is_model(name):
        sizes = f"{name!r}" if name else "a stem or sizes from which it can't be told"
        raise CheckpointError(
            f"expected an architecture of timm or cartl_hub, got a {network.layout.name}: {sizes}; pass architecture= "
            "(--architecture), and model_args= (--model-arg) where it has others than usual."
        )
    return name, shown | dict(args)


# Normalisation


def _constants(network: Network, in_chans: int) -> list[tuple[str, str]]:
    """Names of mean and standard deviation, for each place where the state dict holds them."""
    left = {name for name in network.left if network.state[name].is_floating_point()}
    left = {name for name in left if network.state[name].numel() in (1, in_chans)}
    pairs = []
    for name in network.left:
        for first, second in _CONSTANTS:
            pair = name, name.removesuffix(first) + second
            if is_at(name, first) and left.issuperset(pair):
                pairs.append(pair)
    return pairs


def _normalisation(
    stored: Sequence[tuple[Tensor, Tensor]],
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    in_chans: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from the file or as declared."""
    found = [
        (_channels(first.flatten().tolist(), in_chans), _channels(second.flatten().tolist(), in_chans))
        for first, second in stored
    ]
    if mean is not None and std is not None:
        found.append((_channels(mean, in_chans), _channels(std, in_chans)))
    elif mean is not None or std is not None or not found:
        raise CheckpointError(
            f"expected mean and std of the normalisation, got mean={mean}, std={std}, and {'both' if found else 'none'} in the "
            "file; declare them as the network was trained, e.g. mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616), in "
            "the shell --mean 0.4914,0.4822,0.4465 --std 0.2471,0.2435,0.2616, or 0 and 1 for a network that takes [0, 1] "
            "itself, as that of TRADES does. Wrong ones cost accuracy without an error."
        )
    # a file holds them in fp32, or rounded further
    rounding = 4 * max(torch.finfo(dtype).eps for dtype in (torch.float32, *(first.dtype for first, _ in stored)))
    for other in found[1:]:
        if not np.allclose(found[0], other, rtol=rounding, atol=rounding):
            raise CheckpointError(
                f"expected one normalisation, got mean {found[0][0]}, std {found[0][1]} in the file, but also mean {other[0]}, "
                f"std {other[1]}; leave mean and std out to use what the file holds."
            )
    mean, std = found[0]
    if not all(0 <= value <= 1 for value in mean) or not all(0 < value <= _LARGEST_STD for value in std):
        raise CheckpointError(
            f"expected a mean in [0, 1], as pixels are, and a std in (0, {_LARGEST_STD:g}], got {mean} and {std}."
        )
    return mean, std


def _channels(values: float | Sequence[float], in_chans: int) -> tuple[float, ...]:
    numbers = (float(values),) if isinstance(values, (int, float)) else tuple(map(float, values))
    if len(numbers) not in (1, in_chans):
        raise CheckpointError(f"expected a mean and a std for each of {in_chans} channels, or for all, got {len(numbers)}.")
    return numbers * (in_chans // len(numbers))


# The model


def _build(
    network: Network,
    name: str,
    args: Mapping[str, Any],
    num_classes: int | None,
    in_chans: int,
    input_size: int | tuple[int, int] | None,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    license: str | None,
    torchvisions: bool,
) -> Classifier:
    """The model, with freshly initialised weights; pictures are prepared as torchvision does it, or as timm does."""
    classifier = network.shapes.get(f"{get_pretrained_cfg_value(name, 'classifier')}.weight")
    found = classifier[0] if classifier else num_classes
    if num_classes is not None and found != num_classes:
        raise CheckpointError(f"expected {num_classes} classes, as declared, got {found}.")
    size: Any = get_pretrained_cfg_value(name, "input_size") if input_size is None else input_size
    height, width = (size, size) if isinstance(size, int) else size[-2:]
    cfg = {
        "input_size": (in_chans, height, width),
        "mean": normalisation[0],
        "std": normalisation[1],
        "crop_pct": 1.0,
        "license": license,  # timm's is that of other weights
        **({"interpolation": "bilinear"} if torchvisions else {}),
    }
    chans = {} if in_chans == 3 else {"in_chans": in_chans}
    model: Classifier = created(create_model, name, chans | dict(args), num_classes=found, pretrained_cfg_overlay=cfg)
    if input_size is None and torchvisions and height >= 224:
        model.image_policy = replace(model.image_policy, crop_pct=224 / 256)
    return model


def _account(network: Network, constants: Sequence[tuple[str, str]], model: Classifier) -> tuple[dict[str, str], tuple[str, ...]]:
    """Reasons why entries are dropped, and the counters that have to be created.

    Raises:
        CheckpointError: On entries that are left over, missing, of another shape or type, or not finite: with all their names.
    """
    expected, state, mapped = model.backbone.state_dict(), network.state, network.mapped
    unused = None if network.layout.unused is None else network.prefix + network.layout.unused
    reasons = {name: "normalisation, now in the config" for pair in constants for name in pair}
    over = [old for new, old in mapped.items() if new not in expected]
    for name in network.left:
        original = original_name(name)
        if name in reasons:
            continue
        if unused and name.startswith(unused):
            reasons[name] = "never used in the forward pass"
        elif original not in mapped.values():
            over.append(name)
        elif torch.equal(state[name], state[str(original)]):
            reasons[name] = "second name of a weight, equal to it"
        else:
            over.append(f"{name} (not equal to {original})")
    absent = sorted(expected.keys() - mapped.keys())
    counters = tuple(name for name in absent if is_at(name, "num_batches_tracked"))
    problems: dict[str, list[str]] = {
        "left over": over,
        "missing": [name for name in absent if name not in counters],
        "of another shape or type": [],
        "not finite": [],
        "variances below 0": [],
    }
    for new in expected.keys() & mapped.keys():
        wanted, got = expected[new], state[mapped[new]]
        if got.shape != wanted.shape or got.is_floating_point() != wanted.is_floating_point():
            wrong = f"{mapped[new]} ({got.dtype} {list(got.shape)} instead of {wanted.dtype} {list(wanted.shape)})"
            problems["of another shape or type"].append(wrong)
        elif not torch.isfinite(got.float()).all():
            problems["not finite"].append(mapped[new])
        elif is_at(new, "running_var") and (got < 0).any():
            problems["variances below 0"].append(mapped[new])
    if any(problems.values()):
        named = "; ".join(f"{what}: {listed(sorted(names))}" for what, names in problems.items() if names)
        found = network.layout.infer(network.shapes)[0]
        hint = f" The file has the shapes of {found}." if found and found != model.architecture else ""
        raise CheckpointError(
            f"expected all weights of {model.architecture} ({network.layout.name}) and no others, got {named}.{hint}"
        )
    return reasons, counters
