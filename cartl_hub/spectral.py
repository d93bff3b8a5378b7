"""Spectral norm of linear and convolution weights: measured, and held at a value during training."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

SigmaOf = Literal["kernel", "operator"]
Size = tuple[int, int]


def weighted(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Linear and convolution layers among these modules."""
    return [module for module in modules if isinstance(module, (nn.Conv2d, nn.Linear))]


def kernel_norm(weight: Tensor) -> Tensor:
    """Largest singular value of a weight reshaped to [out, in * kh * kw], exact, float64."""
    matrix = weight.detach().flatten(1).double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()


@torch.no_grad()
def operator_norm(layer: nn.Module, size: Size = (1, 1), *, weight: Tensor | None = None, tolerance: float = 1e-6) -> Tensor:
    """Largest singular value of a layer as a linear map of its input, float64.

    Args:
        layer: A linear layer, or a convolution, whose stride, padding, dilation and groups count.
        size: Height and width of the convolution's input, in pixels.
        weight: In place of the layer's own.
        tolerance: Relative change in one power iteration at which it has converged.
    """
    weight = (layer.weight if weight is None else weight).detach()
    if not isinstance(layer, nn.Conv2d):
        return kernel_norm(weight)
    weight = weight.double()
    v = _unit((1, layer.in_channels, *size), weight)
    sigma = weight.new_zeros(())
    for _ in range(2000):
        mapped = _adjoint(layer, weight, _conv(layer, weight, v), v.shape)
        before, sigma, v = sigma, mapped.norm().sqrt(), F.normalize(mapped, dim=None)
        if (sigma - before).abs() <= tolerance * sigma:
            break
    return sigma


def _unit(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The same unit vector every time: a start must not depend on a global generator."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like), dim=None)


def _conv(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


@torch.enable_grad()
def _adjoint(layer: nn.Module, weight: Tensor, y: Tensor, shape: tuple[int, ...]) -> Tensor:
    x = y.new_zeros(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(_conv(layer, weight, x), x, y)
    return gradient


class _Rescaled(nn.Module):
    """Parametrisation ``beta * W / sigma(W)``; power iteration goes on in train mode only."""

    u: Tensor
    v: Tensor

    def __init__(self, layer: nn.Module, beta: float, iterations: int, sigma: SigmaOf, size: Size):
        super().__init__()
        self.beta, self.iterations, self.size = beta, iterations, size
        self.by_operator = sigma == "operator" and isinstance(layer, nn.Conv2d)
        self._layer = [layer]  # in a list: the layer owns this module, not the other way round
        weight = layer.weight.detach()
        start = (1, layer.in_channels, *size) if self.by_operator else (weight[0].numel(),)
        self.register_buffer("v", _unit(start, weight))
        self.register_buffer("u", torch.zeros_like(self._map(weight, self.v)))
        self._iterate(weight, 15)

    def _map(self, weight: Tensor, v: Tensor) -> Tensor:
        return _conv(self._layer[0], weight, v) if self.by_operator else weight.flatten(1) @ v

    @torch.no_grad()
    def _iterate(self, weight: Tensor, iterations: int) -> None:
        for _ in range(iterations):
            self.u.copy_(F.normalize(self._map(weight, self.v), dim=None))
            back = _adjoint(self._layer[0], weight, self.u, self.v.shape) if self.by_operator else weight.flatten(1).T @ self.u
            self.v.copy_(F.normalize(back, dim=None))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self._iterate(weight.detach(), self.iterations)
            u, v = self.u.clone(), self.v.clone()  # autograd keeps them, and the next iteration writes in place
            return weight * (self.beta / (u * self._map(weight, v)).sum())

    def converged(self, weight: Tensor) -> Tensor:
        """The rescaled weight with the exact sigma, plain."""
        layer = self._layer[0]
        sigma = operator_norm(layer, self.size, weight=weight) if self.by_operator else kernel_norm(weight)
        return (weight.detach().double() * (self.beta / sigma)).to(weight.dtype)


@contextmanager
def rescaled(
    layers: Iterable[nn.Module],
    beta: float,
    *,
    iterations: int = 1,
    sigma: SigmaOf = "kernel",
    sizes: Mapping[nn.Module, Size] | None = None,
) -> Iterator[None]:
    """Train each weight W as ``beta * W / sigma(W)``; on exit fold it into a plain weight, sigma converged.

    Args:
        layers: Linear and convolution layers.
        beta: Spectral norm that each weight gets; one whose norm is smaller grows.
        iterations: Power iterations in each forward pass in train mode.
        sigma: Norm of the kernel reshaped to [out, in * kh * kw], or of the convolution as an operator on its input.
        sizes: Height and width of each convolution's input, for the operator norm.

    Raises:
        ValueError: On a weight of zeros, which no factor can rescale.
    """
    with ExitStack() as stack:
        for layer in layers:
            if not layer.weight.detach().any():
                raise ValueError(f"expected weights with a spectral norm > 0 to rescale to {beta}, got zeros in {layer}.")
            parametrization = _Rescaled(layer, beta, iterations, sigma, (sizes or {}).get(layer, (1, 1)))
            parametrization.train(layer.training)
            parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
            stack.callback(_fold, layer)
        yield


def _fold(layer: nn.Module) -> None:
    chain: nn.Module = layer.parametrizations["weight"]  # type: ignore[index,assignment]
    original, parametrization = chain.original, chain[0]  # type: ignore[index]
    with torch.no_grad():
        original.copy_(parametrization.converged(original))
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def plain_state_dict(model: nn.Module, *, converged: bool = True) -> dict[str, Tensor]:
    """State of ``model`` as it is without parametrisations: plain weights under their plain names.

    Args:
        model: With or without rescaled weights.
        converged: Compute each sigma exactly, as on folding, rather than with the running power iteration.
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
