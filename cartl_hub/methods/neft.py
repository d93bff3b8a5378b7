"""Non-expansive fine-tuning (NEFT)."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import input_sizes, last_blocks
from ..models import Classifier
from ..processes import is_main_process
from ..ranges import check_number, check_whole
from ..spectral import SigmaOf, rescaled, weighted
from .method import Batch, Images, Method

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NEFT(Method):
    """Fine-tuning of the last blocks on natural images, each weight rescaled to a spectral norm (Chen et al., CARTL, ICML 2021).

    Every convolution and linear weight W of these blocks, those of shortcuts included, is ``beta * W / sigma(W)``. It is
    folded into a plain weight when training ends. A warning names weights of other kinds, such as position embeddings.

    Args:
        num_blocks: Number of blocks to train, counted from the classifier.
        beta: Spectral norm of each trained weight, > 0; the paper's best is 0.4. A moving average of the weights
            (``TrainingArguments.ema``) can have smaller norms.
        power_iterations: Number of power iterations per forward pass.
        sigma: Spectral norm to use. "kernel": norm of the kernel reshaped to [out, in * kh * kw], as in the authors' code.
            "operator": norm of the convolution as a map of its input, up to sqrt(kh * kw) times larger.
        convex_residual: Sum the residuals of these blocks as 0.5 shortcut + 0.5 branch, as in the authors' NEFT networks.
            It becomes part of the architecture; a source's own convex sums stay in any case. Only ``wrn*`` and
            ``resnet*_cifar`` support it.

    Raises:
        ValueError: On values out of range, a convex residual sum for another architecture, or convolutions that standardise
            their weight (BiT, NFNet), whose norm bounds nothing.
    """

    num_blocks: int
    beta: float = 0.4
    power_iterations: int = 1
    sigma: SigmaOf = "kernel"
    convex_residual: bool = False

    def __post_init__(self) -> None:
        check_whole("num_blocks", self.num_blocks, (">=", 1))
        check_number("beta", self.beta, (">", 0))
        check_whole("power_iterations", self.power_iterations, (">=", 1))
        if self.sigma not in ("kernel", "operator"):
            raise ValueError(f"sigma must be 'kernel' or 'operator', got {self.sigma!r}.")

    @property
    def trained_blocks(self) -> int | None:
        return self.num_blocks

    @property
    def natural(self) -> bool:
        return type(self).losses is NEFT.losses  # a subclass may do more with the images

    def adapt(self, model: Classifier) -> None:
        last_blocks(model, self.num_blocks)
        if self.convex_residual:
            if not hasattr(model.backbone, "set_convex_blocks"):
                raise ValueError(
                    f"convex_residual is part of the architecture, and {model.architecture} has no such option; "
                    "use a wrn* or resnet*_cifar source, or convex_residual=False."
                )
            # the frozen blocks keep the sums with which their weights were trained
            model.backbone.set_convex_blocks(max(self.num_blocks, model.backbone.convex_blocks))

    @contextmanager
    def setup(self, model: Classifier, images: Images | None = None) -> Iterator[Mapping[str, nn.Module]]:
        blocks = last_blocks(model, self.num_blocks)
        layers = weighted(layer for block in blocks for layer in block.layers())
        bounded = {id(layer.weight) for layer in layers}
        parameters = ((name, weight) for block in blocks for name, weight in block.parameters.items())
        others = [name for name, weight in parameters if weight.ndim > 1 and id(weight) not in bounded]
        if others and is_main_process():
            logger.warning("NEFT bounds weights of Conv2d and Linear only, so not: %s", ", ".join(others))
        sizes = input_sizes(model, layers) if self.sigma == "operator" else {}
        with (
            super().setup(model, images),
            rescaled(layers, self.beta, iterations=self.power_iterations, sigma=self.sigma, sizes=sizes),
        ):
            yield {}

    def losses(self, model: Classifier, batch: Batch) -> dict[str, Tensor]:
        logits = model(batch.images)
        return {"loss": F.cross_entropy(logits, batch.labels), "logits": logits}
