"""Checks of any module, and the mode that it runs in."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run ``model`` in eval mode, then restore the mode of each of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hold hooks that were registered, and remove them at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def double(tensor: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its own device has none (Apple's GPUs)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def check_dtype(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Refuse a module without weights, or with some of another dtype.

    Raises:
        ValueError: If it is refused; the message names the first such weight.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"expected a model with weights, got {name} on the meta device; load the weights first.")
        if tensor.is_floating_point() and tensor.dtype != dtype:
            remedy = "; call model.float() first." if dtype == torch.float32 else ", and images of the other."
            raise ValueError(f"expected a model in {dtype}, got {name} in {tensor.dtype}{remedy}")


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with NaN or infinite values."""
    broken = (name for name, tensor in state.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all())
    return next(broken, None)


def check_finite(state: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite values.

    Raises:
        ValueError: With the name of the first tensor that has some.
    """
    if broken := not_finite(state):
        raise ValueError(f"expected finite weights, got NaN or infinite values in {broken}.")
