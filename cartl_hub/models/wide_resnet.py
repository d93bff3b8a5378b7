"""Wide residual networks for small images (Zagoruyko and Komodakis, 2016, https://arxiv.org/abs/1605.07146)."""

import sys
from functools import partial
from typing import Any

from timm.layers import BatchNormAct2d, ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .defaults import cifar_config

DEPTHS = (10, 16, 22, 28, 34, 40)
WIDTHS = (1, 2, 4, 8, 10, 15, 20)


class WideBlock(nn.Module):
    """Pre-activation basic block; its shortcut convolution reads the activated input, as in the paper's code."""

    def __init__(self, in_chans: int, out_chans: int, stride: int, act_layer: type[nn.Module]):
        super().__init__()
        self.convex = False  # sum of the branches: convex combination, or plain
        self.norm1 = BatchNormAct2d(in_chans, act_layer=act_layer)
        self.conv1 = nn.Conv2d(in_chans, out_chans, 3, stride, 1, bias=False)
        self.norm2 = BatchNormAct2d(out_chans, act_layer=act_layer)
        self.conv2 = nn.Conv2d(out_chans, out_chans, 3, 1, 1, bias=False)
        self.shortcut = None if in_chans == out_chans else nn.Conv2d(in_chans, out_chans, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x)
        shortcut = x if self.shortcut is None else self.shortcut(active)
        branch = self.conv2(self.norm2(self.conv1(active)))
        return 0.5 * shortcut + 0.5 * branch if self.convex else shortcut + branch


class WideResNet(nn.Module):
    """WRN-depth-width.

    Args:
        depth: Number of convolutions, 6n + 4.
        width: Factor of the channels: the three stages have 16, 32 and 64 times this.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout rate before the classifier.
        negative_slope: Negative slope of the leaky ReLU; 0 is ReLU, CARTL's networks use 0.1.
        convex_blocks: Number of last blocks, counted from the classifier, that sum residuals as 0.5 shortcut + 0.5 branch
            (CARTL).

    Raises:
        ValueError: On a depth that is not 6n + 4.
    """

    def __init__(
        self,
        depth: int = 34,
        width: int = 10,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        negative_slope: float = 0.0,
        convex_blocks: int = 0,
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4 with n >= 1 (10, 16, 22, 28, 34, ...), got {depth}.")
        act_layer: Any = partial(nn.LeakyReLU, negative_slope=negative_slope) if negative_slope else nn.ReLU
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = 64 * width
        self.negative_slope, self.grad_checkpointing = negative_slope, False
        self.stem = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        self.stages = nn.Sequential()
        self.feature_info = []
        chans = 16
        for stage, out_chans in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = nn.Sequential()
            for index in range((depth - 4) // 6):
                blocks.append(WideBlock(chans, out_chans, 2 if stage and not index else 1, act_layer))
                chans = out_chans
            self.stages.append(blocks)
            self.feature_info.append({"num_chs": chans, "reduction": 2**stage, "module": f"stages.{stage}"})
        self.norm = BatchNormAct2d(chans, act_layer=act_layer)
        self.head = ClassifierHead(chans, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.set_convex_blocks(convex_blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that a saved config needs beside the architecture's name."""
        args = {"negative_slope": self.negative_slope, "convex_blocks": self.convex_blocks, "in_chans": self.in_chans}
        defaults = {"negative_slope": 0.0, "convex_blocks": 0, "in_chans": 3}
        return {name: value for name, value in args.items() if value != defaults[name]}

    def set_convex_blocks(self, num_blocks: int) -> None:
        """Make the residual sums of the last ``num_blocks`` blocks convex, the others plain.

        The norm and the classifier count as blocks and hold no sum.
        """
        stages: Any = self.stages
        blocks = [block for stage in stages for block in stage]
        self.convex_blocks = num_blocks
        for index, block in enumerate(blocks):
            block.convex = len(blocks) - index + 2 <= num_blocks

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem, residual blocks, norm; the classifier is the rest. The norm is a block of its own, as CARTL counts."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", "norm": r"^norm"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages, as timm's networks give them."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        wanted, last = feature_take_indices(len(self.stages), indices)
        x, maps = self.stem(x), []
        ends = len(self.stages) - 1
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._run(stage, x)
            if index in wanted:
                maps.append(self.norm(x) if norm and index == ends else x)
        if intermediates_only:
            return maps
        return (x if stop_early and last < ends else self.norm(x)), maps

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)
        return self.norm(x)

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        f"wrn{depth}_{width}": cifar_config(first_conv="stem", classifier="head.fc", pool_size=(8, 8))
        for depth in DEPTHS
        for width in WIDTHS
    }
)


def _register(depth: int, width: int) -> None:
    name = f"wrn{depth}_{width}"

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> WideResNet:
        args: dict[str, Any] = {
            "depth": depth,
            "width": width,
            "feature_cfg": {"feature_cls": "getter", "out_indices": (0, 1, 2)},
        }
        return build_model_with_cfg(WideResNet, name, pretrained, **(args | kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"WRN-{depth}-{width}."
    setattr(sys.modules[__name__], name, register_model(entrypoint))


for _depth in DEPTHS:
    for _width in WIDTHS:
        _register(_depth, _width)
