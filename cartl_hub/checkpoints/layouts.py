"""Layouts: how families of networks name their weights elsewhere, and what their shapes show."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor

from .reading import CheckpointError, listed

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Names that a family of networks gives its weights.

    Args:
        name: Name for messages.
        marker: Name of a weight that each network has. What comes before it in a file is the prefix of the network.
        modules: Layers that tell the family from others with the same marker.
        rename: Function from their name to ours; None for a name that isn't theirs.
        infer: Function from shapes by our names to the architecture, None if there is none, and to the arguments that they show.
        unused: Beginning of the names of weights that the forward pass never reads.
    """

    name: str
    marker: str
    modules: tuple[str, ...]
    rename: Callable[[str], str | None]
    infer: Callable[[Shapes], tuple[str | None, dict[str, Any]]]
    unused: str | None = None


# Names


def _renaming(
    block: str, ours: str, shift: int, inside: Mapping[str, str], outside: Mapping[str, str]
) -> Callable[[str], str | None]:
    """Make a function that renames by tables.

    Args:
        block: Pattern of a layer in a residual block: number of its stage, number in the stage, layer.
        ours: Our name of the block, with the two numbers to fill in.
        shift: Number added to that of the stage.
        inside: Names of the layers of a block.
        outside: Names of the other layers.
    """

    def rename(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if found := re.fullmatch(block, module):
            stage, index, layer = found.groups()
            return f"{ours.format(int(stage) + shift, index)}.{inside[layer]}.{leaf}" if layer in inside else None
        return f"{outside[module]}.{leaf}" if module in outside else None

    return rename


_PRE_ACTIVATION = {"bn1": "norm1", "conv1": "conv1", "bn2": "norm2", "conv2": "conv2"}
_POST_ACTIVATION = {layer: layer for layer in ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")}
_DOWNSAMPLE = {"shortcut.0": "downsample.0", "shortcut.1": "downsample.1"}
_SEQUENCE = {"0": "conv1", "1": "bn1", "3": "conv2", "4": "bn2", "6": "conv3", "7": "bn3"}  # the activations are 2 and 5
_STAGE = r"layer(\d)\.(\d+)\.(.+)"


# Shapes


def _wide_resnet(shapes: Shapes) -> tuple[str | None, dict[str, Any]]:
    depth = 6 * _num_blocks(shapes, r"stages\.", 3)[0] + 4
    chans = shapes.get("stages.0.0.conv1.weight", ())[:1]
    return f"wrn{depth}_{sum(chans) // 16}", {}


def _preact_resnet(shapes: Shapes) -> tuple[str | None, dict[str, Any]]:
    known = _num_blocks(shapes, r"stages\.", 4) == (2, 2, 2, 2)
    return "preact_resnet18" if known else None, {"final_norm": any(name.startswith("norm.") for name in shapes)}


def _cifar_resnet(shapes: Shapes) -> tuple[str | None, dict[str, Any]]:
    name = _resnet_name(shapes)
    return f"{name}_cifar" if name else None, {}


def _resnet(shapes: Shapes) -> tuple[str | None, dict[str, Any]]:
    """Infer torchvision's ResNets. Those with a 3x3 stem don't show whether a pooling follows it."""
    large = shapes.get("conv1.weight", ())[2:] == (7, 7)
    return _resnet_name(shapes) if large else None, {}


# Number of convolutions in a block, blocks of each stage, output and input channels of the first block's second convolution
_RESNETS: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {
    (2, (2, 2, 2, 2), (64, 64)): "resnet18",
    (2, (3, 4, 6, 3), (64, 64)): "resnet34",
    (3, (3, 4, 6, 3), (64, 64)): "resnet50",
    (3, (3, 4, 23, 3), (64, 64)): "resnet101",
    (3, (3, 8, 36, 3), (64, 64)): "resnet152",
    (3, (3, 4, 6, 3), (128, 128)): "wide_resnet50_2",
    (3, (3, 4, 23, 3), (128, 128)): "wide_resnet101_2",
    (3, (3, 4, 6, 3), (128, 4)): "resnext50_32x4d",
    (3, (3, 4, 23, 3), (256, 8)): "resnext101_32x8d",
}


def _resnet_name(shapes: Shapes) -> str | None:
    convolutions = 3 if "layer1.0.conv3.weight" in shapes else 2
    second = shapes.get("layer1.0.conv2.weight", ())[:2]
    return _RESNETS.get((convolutions, _num_blocks(shapes, "layer", 4, first=1), second))


def _num_blocks(shapes: Shapes, stage: str, num_stages: int, first: int = 0) -> tuple[int, ...]:
    """Number of blocks of each stage."""
    found = {match[0] for name in shapes if (match := re.match(rf"{stage}\d+\.\d+\.", name))}
    return tuple(sum(bool(re.match(rf"{stage}{first + index}\.", name)) for name in found) for index in range(num_stages))


# Families

WIDE = Layout(
    "WRN of TRADES, RobustBench or CARTL",
    "block1.layer.0.conv1.weight",
    (),
    _renaming(
        r"block(\d)\.layer\.(\d+)\.(.+)",
        "stages.{}.{}",
        -1,
        _PRE_ACTIVATION | {"convShortcut": "shortcut"},
        {"conv1": "stem", "bn1": "norm", "fc": "head.fc"},
    ),
    _wide_resnet,
    unused="sub_block1.",
)
CIFAR = Layout(
    "ResNet for CIFAR",
    "layer1.0.conv1.weight",
    ("bn1", "linear"),
    _renaming(_STAGE, "layer{}.{}", 0, _POST_ACTIVATION | _DOWNSAMPLE, {"conv1": "conv1", "bn1": "bn1", "linear": "fc"}),
    _cifar_resnet,
)
PREACT = Layout(
    "PreActResNet",
    "layer1.0.conv1.weight",
    ("linear",),
    _renaming(
        _STAGE,
        "stages.{}.{}",
        -1,
        _PRE_ACTIVATION | {"shortcut.0": "shortcut"},
        {"conv1": "stem", "bn": "norm", "linear": "head.fc"},
    ),
    _preact_resnet,
)
CARTL_RESNET = Layout(
    "ResNet of CARTL",
    "conv2_x.0.residual_function.0.weight",
    (),
    _renaming(
        r"conv(\d)_x\.(\d+)\.(.+)",
        "layer{}.{}",
        -1,
        {f"residual_function.{number}": layer for number, layer in _SEQUENCE.items()} | _DOWNSAMPLE,
        {"conv1.0": "conv1", "conv1.1": "bn1", "fc": "fc"},
    ),
    _cifar_resnet,
)
TORCHVISION = Layout(
    "ResNet of torchvision",
    "layer1.0.conv1.weight",
    ("fc",),
    _renaming(
        _STAGE,
        "layer{}.{}",
        0,
        _POST_ACTIVATION | {layer: layer for layer in _DOWNSAMPLE.values()},
        {"conv1": "conv1", "bn1": "bn1", "fc": "fc"},
    ),
    _resnet,
)
LAYOUTS = (WIDE, CARTL_RESNET, CIFAR, PREACT, TORCHVISION)  # in this order: a PreActResNet is one without "bn1"
_ONE_SIDED = ("init_conv.weight", "layer_0.0.conv_2d_1.weight")

# Modules that were registered twice: robustness does so with its attacker's model, Andriushchenko and Flammarion (2020) with the
# first layers.
_COPIES = (
    (r"(^|\.)attacker\.model\.", r"\1model."),
    (r"(^|\.)model_preact_hl1\.1\.", r"\1conv1."),
    (r"(^|\.)model_preact_hl1\.2\.", r"\1layer1.0.bn1."),
)


def original_name(name: str) -> str | None:
    """First name of a weight, if this is a known second one."""
    for pattern, replacement in _COPIES:
        if re.search(pattern, name):
            return re.sub(pattern, replacement, name, count=1)
    return None


# Recognise


@dataclass(frozen=True)
class Network:
    """A network in a state dict.

    Args:
        layout: Layout of its family.
        prefix: Prefix of its names.
        state: The whole state dict.
    """

    layout: Layout
    prefix: str
    state: Mapping[str, Tensor]

    @cached_property
    def mapped(self) -> dict[str, str]:
        """Mapping from our names to those in the state dict."""
        own = {name: self.layout.rename(name[len(self.prefix) :]) for name in self.state if name.startswith(self.prefix)}
        return {new: old for old, new in own.items() if new is not None}

    @cached_property
    def shapes(self) -> Shapes:
        """Shapes by our names."""
        return {new: tuple(self.state[old].shape) for new, old in self.mapped.items()}

    @cached_property
    def left(self) -> list[str]:
        """Names in the state dict that aren't those of the family."""
        taken = set(self.mapped.values())
        return [name for name in self.state if name not in taken]


def recognise(state: Mapping[str, Tensor], architecture: str | None, model_args: Mapping[str, Any]) -> Network:
    """The network in a state dict.

    Args:
        state: State dict, with any prefix.
        architecture: Name of the architecture, for weights with timm's names.
        model_args: Arguments of the architecture.

    Raises:
        CheckpointError: If no known network is found, or several are.
    """
    found = _foreign(state)
    if architecture is not None and timm.is_model(architecture):
        own = _own(state, architecture, model_args)
        if own is not None and (found is None or len(own.left) < len(found.left)):
            return own
    if found is not None:
        return found
    if any(is_at(name, marker) for name in state for marker in _ONE_SIDED):
        raise CheckpointError(
            "expected a network with even padding, got one of Gowal et al. (2020), whose convolutions of stride 2 are padded on "
            "one side; cartl_hub has no such architecture."
        )
    names = [layout.name for layout in LAYOUTS]
    raise CheckpointError(
        f"expected the names of a {', '.join(names[:-1])} or {names[-1]}, got {listed(list(state)[:5])}, ...; the formats are "
        "robustness, cartl, robustbench and timm, and weights with timm's names need the right architecture=."
    )


def _foreign(state: Mapping[str, Tensor]) -> Network | None:
    """The network with another project's names."""
    for layout in LAYOUTS:
        if (prefix := _prefix(state, layout.marker)) is not None:
            modules = {name[len(prefix) :].rpartition(".")[0] for name in state if name.startswith(prefix)}
            if modules.issuperset(layout.modules):
                return Network(layout, prefix, state)
    return None


def _own(state: Mapping[str, Tensor], architecture: str, model_args: Mapping[str, Any]) -> Network | None:
    """The network with timm's own names of an architecture."""
    with torch.device("meta"):
        expected = created(timm.create_model, architecture, model_args).state_dict().keys()
    marker = next(iter(expected))
    prefixes = {name.removesuffix(marker) for name in state if is_at(name, marker) and "attacker" not in name.split(".")}
    if not prefixes:
        return None
    matches = {prefix: sum(prefix + name in state for name in expected) for prefix in prefixes}
    layout = Layout(
        f"{architecture} with timm's names",
        marker,
        (),
        lambda name: name if name in expected else None,
        lambda shapes: (None, {}),
    )
    return Network(layout, max(prefixes, key=lambda prefix: matches[prefix]), state)


def created(create: Callable[..., Any], architecture: str, model_args: Mapping[str, Any], **kwargs: Any) -> Any:
    """``create(architecture, ...)``, with an error that says what it was given."""
    try:
        return create(architecture, **model_args, **kwargs)
    except (TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"expected arguments of {architecture}, got {dict(model_args)}: {error}") from error


def _prefix(state: Mapping[str, Tensor], marker: str) -> str | None:
    """Part of the names before the marker; None if it isn't there."""
    prefixes = [name.removesuffix(marker) for name in state if is_at(name, marker)]
    own = [prefix for prefix in prefixes if "attacker" not in prefix.split(".")]
    if prefixes and len(own) != 1:
        places = listed(prefix or "no prefix" for prefix in prefixes)
        raise CheckpointError(f"expected one network, got {places}; save the one that you want in a file of its own.")
    return own[0] if own else None


def is_at(name: str, ending: str) -> bool:
    """Whether a name ends with ``ending``, in whole parts."""
    return name == ending or name.endswith("." + ending)
