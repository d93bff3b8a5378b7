"""Batch-norm policy: which statistics normalise, and whether the affine map is trained."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    return [module for module in modules if isinstance(module, _BatchNorm)]


def is_new(layer: _BatchNorm) -> bool:
    """Whether a layer has the statistics with which it was made, having seen no batch."""
    mean, var = layer.running_mean, layer.running_var
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


@dataclass(frozen=True, kw_only=True)
class BatchNormPolicy:
    """The two choices for batch norm in transfer (Chen et al., CARTL, ICML 2021, section on batch norm).

    The affine map of the feature extractor is never trained, and the statistics of the sub-model always follow the
    target. A method that trains the whole network has no extractor.

    Args:
        extractor_statistics: Statistics in the frozen blocks. "source": normalise with the stored statistics and leave them
            alone; "target": normalise with those of the batch, and update the stored ones.
        submodel_affine: Weight and bias of batch norm in the trained blocks: "trained" or "frozen".
    """

    extractor_statistics: Literal["source", "target"] = "source"
    submodel_affine: Literal["trained", "frozen"] = "trained"

    def __post_init__(self) -> None:
        for name, allowed in (("extractor_statistics", ("source", "target")), ("submodel_affine", ("trained", "frozen"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")

    def describe(self, extractor: Iterable[nn.Module], submodel: Iterable[nn.Module]) -> str:
        """One sentence on what the policy does to these layers."""
        kept, tuned = len(batch_norms(extractor)), len(batch_norms(submodel))
        if not kept and not tuned:
            return "no batch norm in this model: the batch-norm policy has nothing to do"
        whose = "the source's" if self.extractor_statistics == "source" else "updated on the target"
        parts = [f"statistics of {kept} frozen layers {whose}"] if kept else []
        parts += [f"affine maps of {tuned} trained layers {self.submodel_affine}"] if tuned else []
        return f"batch norm: {', '.join(parts)}"

    @contextmanager
    def hold(self, extractor: Iterable[nn.Module], submodel: Iterable[nn.Module]) -> Iterator[None]:
        """Keep the policy while in the block, through any ``model.train()``.

        Args:
            extractor: Layers that are not trained.
            submodel: Layers that are trained.
        """
        affine = [] if self.submodel_affine == "trained" else batch_norms(submodel)
        before = [(parameter, parameter.requires_grad) for layer in affine for parameter in layer.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(False)
        try:
            with frozen_statistics(batch_norms(extractor) if self.extractor_statistics == "source" else []):
                yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)


class FollowingStatistics:
    """Stored statistics that forget the source as batches come in: the mean over the first few steps, then the layer's own moving
    average.

    The source's statistics are wrong as soon as the weights before them change, most of all under NEFT, which rescales weights at
    once. A moving average with momentum 0.1 would keep an eighth of them after 20 steps, all that a small data set may have.

    Args:
        layers: Layers to follow; batch norm without a momentum already is a mean over all batches.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        self._layers = [(layer, layer.momentum) for layer in batch_norms(layers) if layer.momentum is not None]

    def begin_step(self, step: int) -> None:
        """Set the momentum of this step, counted from 0."""
        for layer, momentum in self._layers:
            layer.momentum = max(momentum, 1 / (step + 1))


@contextmanager
def frozen_statistics(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Normalise with the stored statistics and do not update them.

    ``model.train()`` undoes a plain ``layer.eval()``, so each layer returns to eval mode before each forward pass.
    """
    layers = list(layers)
    before = [layer.training for layer in layers]
    handles = [layer.register_forward_pre_hook(_to_eval) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, training in zip(layers, before, strict=True):
            layer.train(training)


def _to_eval(module: nn.Module, args: object) -> None:
    module.eval()
