"""Single-step attacks."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..randomness import START, random_keys, uniform
from .attack import Attack, cross_entropy, eval_mode, input_gradient, project, steepest_direction


def _single_step(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor, keys: Tensor | None, noise: float, step_size: float
) -> Tensor:
    """One step of ``step_size`` from a uniform start in the cube of half side ``noise``; not projected."""
    start = images
    if noise:
        keys = random_keys(len(images), images.device) if keys is None else keys
        start = (images + noise * (2 * uniform(keys, images.shape[1:], stream=START) - 1)).clamp(0, 1)
    with eval_mode(model):
        gradient, _, _ = input_gradient(model, start, labels, cross_entropy)
    return start + step_size * steepest_direction(gradient, attack.norm)


@dataclass(frozen=True, kw_only=True)
class FGSM(Attack):
    """Fast gradient sign method (Goodfellow et al., 2015, https://arxiv.org/abs/1412.6572). In L2, the fast gradient method."""

    def __call__(self, model, images, labels, keys=None, *, until_broken=False):
        return _single_step(self, model, images, labels, keys, noise=0.0, step_size=self.eps).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class RFGSM(Attack):
    """FGSM from a random start, "FGSM-RS" (Wong et al., 2020, https://arxiv.org/abs/2001.03994), Linf, for training.

    Args:
        step_factor: Step size in units of ``eps``.
    """

    step_factor: float = 1.25

    def __call__(self, model, images, labels, keys=None, *, until_broken=False):
        step = _single_step(self, model, images, labels, keys, noise=self.eps, step_size=self.step_factor * self.eps)
        return (images + project(step - images, self.eps, self.norm)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class NFGSM(Attack):
    """Noise-FGSM (de Jorge et al., 2022, https://arxiv.org/abs/2202.01181), Linf, for training.

    Its images leave the ball: it is not projected. It is no attack to evaluate with.

    Args:
        noise_factor: Half width of the uniform noise, in units of ``eps``.
    """

    noise_factor: float = 2.0

    def __call__(self, model, images, labels, keys=None, *, until_broken=False):
        noise = self.noise_factor * self.eps
        return _single_step(self, model, images, labels, keys, noise=noise, step_size=self.eps).clamp(0, 1)
