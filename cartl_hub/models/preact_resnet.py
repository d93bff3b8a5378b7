"""Pre-activation residual network for small images (He et al., 2016, https://arxiv.org/abs/1603.05027).

The PreActResNet-18 of fast adversarial training (Wong et al., 2020) and of robust overfitting (Rice et al., 2020), whose authors
differ in two details: what the shortcut convolutions read, and whether there is a norm before the classifier.
"""

from typing import Any

from timm.layers import BatchNormAct2d, ClassifierHead
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .wide_resnet import WideBlock


class RawShortcutBlock(WideBlock):
    """Pre-activation block whose shortcut convolution reads what enters the block, before the norm."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return shortcut + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class PreActResNet(nn.Module):
    """Pre-activation ResNet with a 3x3 stem and four stages of 64, 128, 256 and 512 channels.

    Args:
        layers: Number of blocks in each stage.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of channels of the images.
        global_pool: Pooling before the classifier, as in timm.
        drop_rate: Dropout rate before the classifier.
        activated_shortcut: Whether shortcut convolutions read the activated input (He et al., Rice et al.) or the raw one (Wong
            et al.).
        final_norm: Whether there are a norm and an activation before the pooling.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (2, 2, 2, 2),
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        activated_shortcut: bool = True,
        final_norm: bool = True,
    ):
        super().__init__()
        block = WideBlock if activated_shortcut else RawShortcutBlock
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.activated_shortcut, self.final_norm = activated_shortcut, final_norm
        self.stem = nn.Conv2d(in_chans, 64, 3, 1, 1, bias=False)
        self.stages = nn.Sequential()
        self.feature_info = []
        chans = 64
        for stage, num_blocks in enumerate(layers):
            blocks = nn.Sequential()
            for index in range(num_blocks):
                blocks.append(block(chans, 64 * 2**stage, 2 if stage and not index else 1, nn.ReLU))
                chans = 64 * 2**stage
            self.stages.append(blocks)
            self.feature_info.append({"num_chs": chans, "reduction": 2**stage, "module": f"stages.{stage}"})
        self.num_features = self.head_hidden_size = chans
        self.norm = BatchNormAct2d(chans) if final_norm else nn.Identity()
        self.head = ClassifierHead(chans, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments that a saved config needs beside the architecture's name."""
        args = {"activated_shortcut": self.activated_shortcut, "final_norm": self.final_norm, "in_chans": self.in_chans}
        defaults = {"activated_shortcut": True, "final_norm": True, "in_chans": 3}
        return {name: value for name, value in args.items() if value != defaults[name]}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Stem, residual blocks, norm; the classifier is the rest."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", "norm": r"^norm"}

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs(
    {
        "preact_resnet18": {
            "url": "",
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.4914, 0.4822, 0.4465),  # CIFAR-10
            "std": (0.2471, 0.2435, 0.2616),
            "first_conv": "stem",
            "classifier": "head.fc",
            "license": "mit",
        }
    }
)


@register_model
def preact_resnet18(pretrained: bool = False, **kwargs: Any) -> PreActResNet:
    """PreActResNet-18."""
    args: dict[str, Any] = {"feature_cfg": {"feature_cls": "hook", "out_indices": (0, 1, 2, 3)}}
    return build_model_with_cfg(PreActResNet, "preact_resnet18", pretrained, **(args | kwargs))
