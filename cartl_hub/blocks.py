"""Ordered block partition of a model, and which of its parameters are trained."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from .models import Classifier
from .modules import eval_mode, hooked
from .spectral import Size


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a model.

    Args:
        name: Common part of its layers' names, e.g. "stages.2.1".
        modules: Largest modules, by name in the backbone. Their layers are in this block and in no other.
        parameters: Parameters of the block, by name in the backbone; some models hold a few outside any layer.
    """

    name: str
    modules: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    def layers(self) -> list[nn.Module]:
        """All modules inside, including containers."""
        return list(chain.from_iterable(module.modules() for module in self.modules.values()))


def list_blocks(model: Classifier) -> list[Block]:
    """Blocks in forward order: ``[0]`` is the stem, ``[-1]`` the classifier.

    Blocks are counted from the classifier and the stem has no number (CARTL): "the last k blocks" are ``[-k:]``. The
    partition is the one that the architecture declares in timm's ``group_matcher``: a new architecture needs no code here.
    """
    backbone, head = model.backbone, model.head
    parameters = dict(backbone.named_parameters())
    names = chain(parameters, (name for name, _ in backbone.named_buffers()))
    groups = group_with_matcher(((name, None) for name in names), backbone.group_matcher(coarse=False))
    members: list[list[str]] = []
    for group in groups.values():
        if not members or any(name in parameters for name in group):
            members.append(list(group))
        else:  # statistics without parameters go with what comes before
            members[-1].extend(group)
    owner = {name: index for index, group in enumerate(members) for name in group}
    modules: list[dict[str, nn.Module]] = [{} for _ in members]

    def is_container(module: nn.Module) -> bool:
        """Whether it is a stage of one block, or the classifier with the pooling before it, which belongs to no block."""
        stage = isinstance(module, nn.Sequential) and len(module) == 1
        return stage or (module is not head and any(inner is head for inner in module.modules()))

    def place(module: nn.Module, prefix: str) -> None:
        """Give the module to the block that has all of it, or place what is inside."""
        inside = chain(module.named_parameters(prefix), module.named_buffers(prefix))
        owners = {owner[name] for name, _ in inside if name in owner}
        if prefix and len(owners) == 1 and not is_container(module):
            modules[owners.pop()][prefix] = module
        else:
            for name, child in module.named_children():
                place(child, f"{prefix}.{name}" if prefix else name)

    place(backbone, "")
    blocks = []
    for group, largest in zip(members, modules, strict=True):
        own = {name: parameters[name] for name in group if name in parameters}
        blocks.append(Block(name=" + ".join(largest) or " + ".join(own), modules=largest, parameters=own))
    return blocks


def last_blocks(model: Classifier, num_blocks: int | None) -> list[Block]:
    """The last ``num_blocks`` blocks, classifier included; None is the whole network with its stem.

    Raises:
        ValueError: If the model has fewer blocks, or there is no classifier among them.
    """
    blocks = list_blocks(model)
    if not blocks[-1].parameters or not set(blocks[-1].layers()) & set(model.head.modules()):
        raise ValueError(f"expected a {model.architecture} with a classifier, got one without; create it with num_classes > 0.")
    if num_blocks is None:
        return blocks
    if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or not 1 <= num_blocks < len(blocks):
        raise ValueError(f"num_blocks must be in [1, {len(blocks) - 1}] for this {model.architecture}, got {num_blocks}.")
    return blocks[-num_blocks:]


def count_blocks(model: Classifier, num_residual: int) -> int:
    """The ``num_blocks`` that covers the classifier and ``num_residual`` residual blocks before it, with the norms between them.

    Args:
        model: Model with a classifier.
        num_residual: Number of blocks with a convolution or linear layer, except the classifier; 0 is the classifier alone.

    Raises:
        ValueError: If the model has fewer.
    """
    before = list_blocks(model)[-2:0:-1]
    weighted = [place for place, block in enumerate(before, 1) if any(p.ndim > 1 for p in block.parameters.values())]
    if not 0 <= num_residual <= len(weighted):
        raise ValueError(
            f"expected at most the {len(weighted)} residual blocks that this {model.architecture} has, got {num_residual}."
        )
    return 1 + (weighted[num_residual - 1] if num_residual else 0)


@contextmanager
def trained_only(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Train these parameters and no others of ``model``."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextmanager
def recorded_input(model: Classifier, modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the input of ``modules``, once per forward pass of ``model``: the input of the one that runs first.

    With the modules of a block, that is the input of the block as a container: for a pre-activation block what comes before
    its first norm, for the classifier the pooled features.
    """
    inputs: list[Tensor] = []
    armed = False

    def arm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal armed
        armed = True

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal armed
        if armed:
            several = isinstance(args[0], (list, tuple))  # a layer of a DenseNet takes a list of feature maps
            inputs.append(torch.cat([part.flatten(1) for part in args[0]], 1) if several else args[0])
        armed = False

    handles = [model.backbone.register_forward_pre_hook(arm)]
    handles += [module.register_forward_pre_hook(record) for module in modules]
    with hooked(handles):
        yield inputs


def input_sizes(model: Classifier, layers: Sequence[nn.Module]) -> dict[nn.Module, Size]:
    """Height and width that each convolution among ``layers`` sees for an image of the model's input size."""
    sizes: dict[nn.Module, Size] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].ndim == 4:
            sizes[layer] = (args[0].shape[2], args[0].shape[3])

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    with hooked(handles), torch.no_grad(), eval_mode(model):
        model(torch.zeros(1, model.image_policy.num_channels, *model.image_policy.size, device=model.mean.device))
    return sizes
