"""The model class of the library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..images import CropMode, ImagePolicy, Interpolation
from ..modules import check_dtype, eval_mode

# Arguments of timm.create_model that say where weights come from, not what is built.
NOT_BUILT = ("num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class Prediction:
    """Most probable classes of one picture, best first.

    Args:
        names: Label names, or class numbers as strings if the model has no names.
        probabilities: Probabilities of these classes, in [0, 1].
    """

    names: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in zip(self.names, self.probabilities, strict=True))


class Classifier(nn.Module):
    """A timm backbone that takes images in [0, 1].

    Normalisation is the first step, so that attacks work in pixel space. Its constants come from the backbone's
    ``pretrained_cfg`` and are not part of the weights: a saved backbone expects normalised input, as in timm.

    Args:
        backbone: timm model with a ``group_matcher``, e.g. ``timm.create_model("resnet18", num_classes=10)``.
        architecture: Name of the backbone in timm; detected automatically for a model from ``timm.create_model``.
        model_args: Arguments of ``timm.create_model`` beside ``num_classes``, as a saved config needs them.
        label_names: Name of each class.
        image_policy: Policy that turns pictures into inputs; by default as timm evaluates the backbone.
        lineage: Record of what the model was made from and how; JSON, saved with the model.

    ``stored_as`` is the dtype of the weights in their file; they are float32 in memory
    (:func:`cartl_hub.weights.round_weights`).

    Raises:
        TypeError: If ``backbone`` isn't a timm model.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        architecture: str | None = None,
        model_args: Mapping[str, Any] | None = None,
        label_names: Sequence[str] | None = None,
        image_policy: ImagePolicy | None = None,
        lineage: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        timm_model: Any = backbone
        complete = all(hasattr(backbone, name) for name in ("pretrained_cfg", "group_matcher", "get_classifier"))
        if not complete or not isinstance(timm_model.get_classifier(), nn.Module):
            raise TypeError(
                f"expected a timm model with a group_matcher and one classifier, got {type(backbone).__name__}; make it with "
                "timm.create_model, or, only to evaluate it, pass it to cartl_hub.evaluate as it is."
            )
        cfg = timm_model.pretrained_cfg
        self.backbone: Any = backbone
        self.architecture = architecture or cfg["architecture"]
        self._model_args = dict(model_args or {})
        self.label_names = None if label_names is None else tuple(map(str, label_names))
        self.lineage = dict(lineage or {})
        self.stored_as = torch.float32
        in_chans, *size = cfg["input_size"]
        in_chans = self._model_args.get("in_chans", getattr(backbone, "in_chans", in_chans))
        if in_chans not in (1, 3):
            raise ValueError(f"expected a network of 1 or 3 input channels, for grey or RGB pictures, got {in_chans}.")
        pictures = resolve_data_config(pretrained_cfg=cfg)
        self.image_policy = image_policy or ImagePolicy(
            size=_input_size(backbone, size),
            mode="L" if in_chans == 1 else "RGB",
            interpolation=pictures["interpolation"] if pictures["interpolation"] in get_args(Interpolation) else "bicubic",
            crop_mode=pictures["crop_mode"] if pictures["crop_mode"] in get_args(CropMode) else "center",
            crop_pct=pictures["crop_pct"],
        )
        for name in ("mean", "std"):
            values = tuple(cfg[name])
            if len(values) != in_chans:  # timm keeps three constants for a network of one channel
                values = (sum(values) / len(values),) * in_chans
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def num_classes(self) -> int:
        return int(self.backbone.num_classes)

    @property
    def head(self) -> nn.Module:
        """The classifier layer."""
        return self.backbone.get_classifier()

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments with which ``timm.create_model`` builds the backbone again, beside ``num_classes``."""
        return self._model_args | getattr(self.backbone, "model_args", {})

    def reset_head(self, label_names: Sequence[str], *, seed: int = 0) -> None:
        """Replace the classifier by a new one for these classes, drawn from ``seed``: the same on every device."""
        device = self.mean.device
        self.backbone.cpu()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.backbone.reset_classifier(len(label_names))
        self.backbone.to(device)
        self.label_names = tuple(map(str, label_names))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features, the input of the classifier: [B, C, H, W] in [0, 1] -> [B, D]."""
        maps = self.backbone.forward_features((images - self.mean) / self.std)
        return self.backbone.forward_head(maps, pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        """Logits: [B, C, H, W] in [0, 1] -> [B, K].

        Raises:
            ValueError: If the images have another number of channels, over which the constants would be broadcast.
        """
        if images.shape[1] != self.image_policy.num_channels:
            raise ValueError(f"expected images with {self.image_policy.num_channels} channels, got {list(images.shape)}.")
        return self.backbone((images - self.mean) / self.std)

    @torch.inference_mode()
    def predict(self, pictures: Any, *, top: int = 5, batch_size: int = 64) -> list[Prediction]:
        """Names and probabilities for pictures of any size and form.

        Args:
            pictures: Picture or list of pictures: PIL images, paths, encoded bytes, arrays [H, W(, C)], tensors [C, H, W].
            top: Number of classes to return for each picture.
            batch_size: Number of pictures per forward pass.

        Raises:
            ValueError: If a picture can't be read; the message gives its position. If weights aren't in fp32.
        """
        check_dtype(self)
        if not isinstance(pictures, (list, tuple)):
            pictures = [pictures]
        inputs = []
        for position, picture in enumerate(pictures):
            try:
                inputs.append(self.image_policy(picture))
            except ValueError as error:
                name = f" ({picture})" if isinstance(picture, (str, Path)) else ""
                raise ValueError(f"picture {position}{name}: {error}") from error
        names = self.label_names or tuple(map(str, range(self.num_classes)))
        predictions = []
        with eval_mode(self):
            for start in range(0, len(inputs), batch_size):
                batch = torch.stack(inputs[start : start + batch_size]).to(self.mean.device) / 255
                for row in self(batch).float().softmax(1):
                    shares, classes = row.topk(min(top, len(row)))
                    predictions.append(Prediction(tuple(names[i] for i in classes.tolist()), tuple(shares.tolist())))
        return predictions


def _input_size(backbone: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    """Input size of a backbone: a ViT's own ``img_size``; for the others, what their config says."""
    img_size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    height, width = img_size or size
    return int(height), int(width)


def create_model(name: str, **kwargs: Any) -> Classifier:
    """``timm.create_model`` with the normalisation inside.

    Args:
        name: Name of the architecture in timm, e.g. "wrn28_4" or "resnet18".
        kwargs: Arguments of ``timm.create_model``.
    """
    backbone = timm.create_model(name, **kwargs)
    remote = name.startswith(("hf-hub:", "local-dir:"))
    model_args = {key: value for key, value in kwargs.items() if key not in NOT_BUILT}
    return Classifier(backbone, architecture=None if remote else name.partition(".")[0], model_args=model_args)
