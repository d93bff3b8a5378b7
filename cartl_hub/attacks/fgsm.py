"""Single-step attacks."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..ranges import check_number
from .attack import Attack, Norm, confine, input_gradient, random_start, steepest_direction
from .losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Fast gradient sign method (Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572). In L2, the fast gradient method."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return _ascend(model, images, labels, self.eps, self.norm).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class RFGSM(Attack):
    """FGSM from a random start in the ball, "FGSM-RS" (Wong et al., 2020, https://arxiv.org/abs/2001.03994), for training.

    Args:
        step_factor: Step size in units of ``eps``.

    Raises:
        ValueError: On a negative factor, beside what :class:`Attack` raises.
    """

    step_factor: float = 1.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("step_factor", self.step_factor, (">=", 0))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        start = random_start(images, keys, self.eps, self.norm)
        moved = _ascend(model, start, labels, self.step_factor * self.eps, self.norm)
        return confine(images, moved, self.eps, self.norm)


@dataclass(frozen=True, kw_only=True)
class NFGSM(Attack):
    """Noise-FGSM (de Jorge et al., 2022, https://arxiv.org/abs/2202.01181), Linf, for training only.

    It is not projected: its images leave the ball by up to ``noise_factor`` times ``eps``.

    Args:
        noise_factor: Half-width of the uniform noise, in units of ``eps``.

    Raises:
        ValueError: On a norm other than Linf, a negative factor, or ``until_broken``, beside what :class:`Attack` raises.
    """

    noise_factor: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "Linf":
            raise ValueError(f"NFGSM is an Linf attack, got norm={self.norm!r}; RFGSM and PGD have both norms.")
        check_number("noise_factor", self.noise_factor, (">=", 0))

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        start = random_start(images, keys, self.noise_factor * self.eps, self.norm)
        return _ascend(model, start, labels, self.eps, self.norm).clamp(0, 1)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        raise ValueError("expected an attack that stays in its ball for an evaluation, got NFGSM; use FGSM or PGD.")


def _ascend(model: nn.Module, images: Tensor, labels: Tensor, step_size: float, norm: Norm) -> Tensor:
    gradient, _, _ = input_gradient(model, images, labels, cross_entropy)
    return images + step_size * steepest_direction(gradient, norm)
