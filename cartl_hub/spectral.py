"""Spectral norm of linear and convolution weights: measured, and kept at a value during training."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame, pad_same
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from .modules import double

SigmaOf = Literal["kernel", "operator"]
Size = tuple[int, int]
Layer = nn.Conv2d | nn.Linear


def weighted(modules: Iterable[nn.Module]) -> list[Layer]:
    """Linear and convolution layers among these modules."""
    return [module for module in modules if isinstance(module, (nn.Conv2d, nn.Linear))]


def kernel_norm(weight: Tensor) -> Tensor:
    """Largest singular value of a weight reshaped to [out, in * kh * kw], exact, float64; NaN for a weight that isn't finite."""
    matrix = double(weight.detach().flatten(1))
    if not matrix.isfinite().all():  # LAPACK would raise, in place of the error that says that training diverged
        return matrix.new_tensor(torch.nan)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()


@torch.no_grad()
def operator_norm(layer: Layer, size: Size = (1, 1), *, weight: Tensor | None = None, tolerance: float = 1e-5) -> Tensor:
    """Largest singular value of a layer as a linear map A of its input, float64; NaN for a weight that isn't finite.

    By Rayleigh-Ritz: a subspace grows by the residual of its best vector under A^T A. That takes some tens of steps where power
    iteration takes hundreds: a convolution has many singular values close to its largest.

    Args:
        layer: Linear layer, or a convolution, whose stride, padding, dilation and groups count.
        size: Height and width of the convolution's input, in pixels.
        weight: Weight to use in place of the layer's own.
        tolerance: Relative residual at which the iteration ends. The relative error of the result is at most half of it.
    """
    weight = (layer.weight if weight is None else weight).detach()
    if not isinstance(layer, nn.Conv2d) or not weight.isfinite().all():
        return kernel_norm(weight)
    weight = double(weight)
    scale = weight.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # small numbers must not underflow in A^T A
    weight, shape = weight / scale, (1, layer.in_channels, *size)
    basis = _unit(shape, weight).flatten()[None]
    mapped, projected = basis[:0], weight.new_zeros(0, 0)  # the basis under A^T A, and that in terms of the basis
    while True:
        newest = _adjoint(layer, weight, _conv(layer, weight, basis[-1].view(shape)), shape).flatten()
        mapped, projected = torch.cat([mapped, newest[None]]), F.pad(projected, (0, 1, 0, 1))
        projected[-1] = basis @ newest
        values, vectors = torch.linalg.eigh(projected)  # which reads the lower triangle
        best, largest = vectors[:, -1], values[-1].clamp(min=0)
        residual = best @ mapped - largest * (best @ basis)
        if residual.norm() <= tolerance * largest:
            return scale * largest.sqrt()
        if len(basis) == 64:  # begin again from the best vector, to bound the memory
            basis, mapped, projected = (best @ basis)[None], (best @ mapped)[None], largest.view(1, 1)
        residual = residual - basis.T @ (basis @ residual)
        basis = torch.cat([basis, _normalised(residual)[None]])


def _unit(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same unit vector every time: a start must not depend on a global generator."""
    return _normalised(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like))


def _normalised(x: Tensor) -> Tensor:
    return x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)


def _conv(layer: Layer, weight: Tensor, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer, Conv2dSame):
        x = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    return layer._conv_forward(x, weight, None)  # which knows its padding mode


@torch.enable_grad()
def _adjoint(layer: Layer, weight: Tensor, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    x = y.new_zeros(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(_conv(layer, weight, x), x, y)
    return gradient


class _Rescaled(nn.Module):
    """Parametrisation ``beta * W / sigma(W)``; power iteration advances in train mode only."""

    u: Tensor
    v: Tensor

    def __init__(self, layer: Layer, beta: float, iterations: int, sigma: SigmaOf, size: Size):
        super().__init__()
        self.beta, self.iterations, self.size = beta, iterations, size
        self.by_operator = sigma == "operator" and isinstance(layer, nn.Conv2d)
        self._layer = [layer]  # in a list: the layer owns this module, not the other way round
        weight = layer.weight.detach()
        start = (1, layer.in_channels, *size) if isinstance(layer, nn.Conv2d) and self.by_operator else (weight[0].numel(),)
        self.register_buffer("v", _unit(start, weight))
        self.register_buffer("u", torch.zeros_like(self._map(weight, self.v)))
        self._iterate(weight, 15)

    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        return _conv(self._layer[0], weight, v) if self.by_operator else weight.flatten(1) @ v

    @torch.no_grad()
    def _iterate(self, weight: Tensor, iterations: int) -> None:
        for _ in range(iterations):
            self.u.copy_(_normalised(self._map(weight, self.v)))
            back = _adjoint(self._layer[0], weight, self.u, self.v.shape) if self.by_operator else weight.flatten(1).T @ self.u
            self.v.copy_(_normalised(back))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self._iterate(weight.detach(), self.iterations)
            u, v = self.u.clone(), self.v.clone()  # autograd keeps them, and the next iteration writes in place
            return weight * (self.beta / (u * self._map(weight, v)).sum())

    def converged(self, weight: Tensor) -> Tensor:
        """The rescaled weight with the exact sigma, as a plain tensor."""
        layer = self._layer[0]
        sigma = operator_norm(layer, self.size, weight=weight) if self.by_operator else kernel_norm(weight)
        return (double(weight.detach()) * (self.beta / sigma)).to(weight)


@contextmanager
def rescaled(
    layers: Iterable[Layer],
    beta: float,
    *,
    iterations: int = 1,
    sigma: SigmaOf = "kernel",
    sizes: Mapping[nn.Module, Size] | None = None,
) -> Iterator[None]:
    """Train each weight W as ``beta * W / sigma(W)``; on exit fold it into a plain weight, with a converged sigma.

    Args:
        layers: Linear and convolution layers.
        beta: Spectral norm that each weight gets; a weight with a smaller norm grows.
        iterations: Number of power iterations in each forward pass in train mode.
        sigma: Norm of the kernel reshaped to [out, in * kh * kw], or of the convolution as an operator on its input.
        sizes: Height and width of each convolution's input, for the operator norm.

    Raises:
        ValueError: On a weight of zeros, which no factor can rescale, a weight that its layer standardises, or a missing size;
            nothing has changed then.
    """
    layers = list(layers)
    for layer in layers:
        _refuse_standardised(layer)
        if not layer.weight.detach().any():
            raise ValueError(f"expected a weight with a spectral norm > 0, to rescale it to {beta}, got zeros in {layer}.")
        if sigma == "operator" and isinstance(layer, nn.Conv2d) and layer not in (sizes or {}):
            raise ValueError(f"expected the size of the input of {layer} for its operator norm, got none; pass it in sizes.")
    with ExitStack() as stack:
        for layer in layers:
            parametrization = _Rescaled(layer, beta, iterations, sigma, (sizes or {}).get(layer, (1, 1)))
            parametrization.train(layer.training)
            parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
            stack.callback(_fold, layer)
        yield


def _fold(layer: Layer) -> None:
    parametrized: Any = layer
    chain = parametrized.parametrizations["weight"]
    original, parametrization = chain.original, chain[0]
    with torch.no_grad():
        original.copy_(parametrization.converged(original))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    layer._parameters["bias"] = layer._parameters.pop("bias")  # behind the weight again: optimisers know parameters by position


def _refuse_standardised(layer: nn.Module) -> None:
    if isinstance(layer, (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)):
        raise ValueError(
            f"expected layers that use their weight as it is, got {type(layer).__name__}, which standardises it in each forward "
            "pass, so that its spectral norm says nothing; use another architecture, or train these blocks without a bound."
        )


def plain_state_dict(model: nn.Module, *, converged: bool = True) -> dict[str, Tensor]:
    """State of ``model`` as it is without parametrisations: plain weights under their plain names.

    Args:
        model: Model with or without rescaled weights.
        converged: Compute each sigma exactly, as when folding, rather than with the running power iteration.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, mark, entry = name.partition(".parametrizations.weight.")
        if not mark:
            state[name] = tensor
        elif entry == "original":
            (parametrization,) = model.get_submodule(f"{owner}.parametrizations.weight").children()
            assert isinstance(parametrization, _Rescaled)
            training = parametrization.training
            with torch.no_grad():
                state[f"{owner}.weight"] = (
                    parametrization.converged(tensor) if converged else parametrization.eval()(tensor).detach()
                )
            parametrization.train(training)
    return state


@dataclass(frozen=True, kw_only=True)
class LipschitzRow:
    """Bound on how far one layer can stretch a difference of its inputs, in the 2-norm.

    Args:
        name: Name of the layer.
        kernel_norm: Spectral norm of the weight reshaped to [out, in * kh * kw]; None for batch norm.
        operator_norm: Spectral norm of the layer as a linear map; None for batch norm.
        batch_norm: Largest |weight| / sqrt(variance + eps) with the stored variance; None for other layers.
    """

    name: str
    kernel_norm: float | None = None
    operator_norm: float | None = None
    batch_norm: float | None = None

    @property
    def factor(self) -> float:
        """The bound: the operator norm, or that of batch norm in eval mode."""
        factor = self.operator_norm if self.batch_norm is None else self.batch_norm
        assert factor is not None
        return factor


def lipschitz_table(layers: Mapping[str, nn.Module], sizes: Mapping[nn.Module, Size]) -> list[LipschitzRow]:
    """Bounds of the linear, convolution and batch-norm layers among ``layers``, in their order.

    Batch norm counts: it can undo what a bound on the weights does.

    Args:
        layers: Layers by name; kinds other than these three are left out.
        sizes: Height and width of each convolution's input, in pixels.

    Raises:
        ValueError: On a convolution that standardises its weight.
    """
    rows = []
    for name, layer in layers.items():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            _refuse_standardised(layer)
            operator = operator_norm(layer, sizes[layer]) if isinstance(layer, nn.Conv2d) else kernel_norm(layer.weight)
            rows.append(LipschitzRow(name=name, kernel_norm=float(kernel_norm(layer.weight)), operator_norm=float(operator)))
        elif isinstance(layer, _BatchNorm):
            assert layer.running_var is not None
            weight = torch.ones_like(layer.running_var) if layer.weight is None else layer.weight.detach()
            rows.append(LipschitzRow(name=name, batch_norm=float((weight.abs() / (layer.running_var + layer.eps).sqrt()).max())))
    return rows


def lipschitz_product(rows: Iterable[LipschitzRow]) -> float:
    """Product of the factors.

    It bounds a chain of these layers and of activations that do not expand, e.g. ReLU, in eval mode. Parallel layers are not a
    chain: a residual sum is bounded by the sum of its branches (shortcut 1, or its convolution), not by their product.
    """
    return math.prod(row.factor for row in rows)
