"""Residual networks with the small stem that 32x32 images need (He et al., 2016, https://arxiv.org/abs/1512.03385).

timm's ResNet with a 3x3 first convolution of stride 1 and no max-pooling; everything else is timm's.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .defaults import cifar_config


class Halved(nn.Module):
    """An activation of half its input: after the sum of shortcut and branch it makes the sum convex."""

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(0.5 * x)


class CifarResNet(ResNet):
    """ResNet for small images.

    Args:
        block: Residual block class from timm.
        layers: Number of blocks in each of the four stages.
        convex_blocks: Number of last blocks, counted from the classifier, that sum residuals as 0.5 shortcut + 0.5 branch
            (CARTL).
        kwargs: Arguments of timm's ``ResNet``.
    """

    def __init__(self, block: Any, layers: tuple[int, ...], convex_blocks: int = 0, **kwargs: Any):
        super().__init__(block, layers, **kwargs)
        self.in_chans = kwargs.get("in_chans", 3)
        stem = nn.Conv2d(self.in_chans, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
        self.conv1, self.maxpool = stem, nn.Identity()  # type: ignore[assignment]
        feature_info: Any = self.feature_info
        for info in feature_info:
            info["reduction"] = max(1, info["reduction"] // 4)
        self.set_convex_blocks(convex_blocks)

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that a saved config needs beside the architecture's name."""
        args = {"convex_blocks": self.convex_blocks, "in_chans": self.in_chans}
        defaults = {"convex_blocks": 0, "in_chans": 3}
        return {name: value for name, value in args.items() if value != defaults[name]}

    def set_convex_blocks(self, num_blocks: int) -> None:
        """Make the residual sums of the last ``num_blocks`` blocks convex, the others plain.

        The classifier counts as a block and holds no sum.
        """
        stages: Any = (self.layer1, self.layer2, self.layer3, self.layer4)
        blocks = [block for stage in stages for block in stage]
        self.convex_blocks = num_blocks
        for index, block in enumerate(blocks):
            name = "act3" if isinstance(block, Bottleneck) else "act2"
            act = getattr(block, name)
            plain = act.act if isinstance(act, Halved) else act
            convex = len(blocks) - index + 1 <= num_blocks
            setattr(block, name, Halved(plain).train(block.training) if convex else plain)


default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar": cifar_config(first_conv="conv1", classifier="fc", pool_size=(4, 4)) for depth in (18, 34, 50)}
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, name, pretrained, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 with a 3x3 stem and no max-pooling."""
    return _create("resnet18_cifar", pretrained, block=BasicBlock, layers=(2, 2, 2, 2), **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 with a 3x3 stem and no max-pooling."""
    return _create("resnet34_cifar", pretrained, block=BasicBlock, layers=(3, 4, 6, 3), **kwargs)


@register_model
def resnet50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-50 with a 3x3 stem and no max-pooling."""
    return _create("resnet50_cifar", pretrained, block=Bottleneck, layers=(3, 4, 6, 3), **kwargs)
