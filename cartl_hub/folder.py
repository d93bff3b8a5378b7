"""A model as a folder: weights, config, report and card.

It is timm's own format: ``model.safetensors`` with timm's keys, ``config.json`` in timm's schema. What timm has no place for lies
under the key "cartl_hub" of the config.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from .blocks import list_blocks
from .files import sha256, write_file
from .images import ImagePolicy, policy_to_dict
from .models import Classifier, create_model
from .models.classifier import NOT_BUILT
from .report import Report

FORMAT_VERSION = 1
WEIGHTS, CONFIG, REPORT, CARD = "model.safetensors", "config.json", "report.json", "README.md"
_PLAIN = (str, int, float, bool, type(None), list)
_LARGEST = 65_536  # of any count or size in a config: more is a mistake or an attack on the memory
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class ModelError(ValueError):
    """A model that can't be loaded; the message says what was expected, what was found, and what to do."""


# Save


def save_model(model: Classifier, folder: str | Path, *, report: Report | None = None, card: str | None = None) -> Path:
    """Write ``model.safetensors`` and ``config.json``, and the report and the card where there are any.

    Each file is replaced as a whole, ``config.json`` last. Of several processes the first one writes.

    Args:
        model: Its weights must be plain: a model under training is saved after it.
        folder: Made where it doesn't exist.
        report: What was measured.
        card: Text of README.md.

    Raises:
        ValueError: If weights are reparametrised or not finite.
    """
    folder = Path(folder)
    if not is_main_process():
        return folder
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.backbone.state_dict().items()}
    for name, tensor in state.items():
        if ".parametrizations." in name:
            raise ValueError(f"expected plain weights, got the reparametrised {name}; save the model when training has ended.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"expected finite weights, got NaN or infinite values in {name}.")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, serialise(state, {"format": "pt"}))  # one entry: several come in random order
    if report is not None:
        report.save(folder)
    if card is not None:
        write_file(folder / CARD, card)
    write_file(folder / CONFIG, json.dumps(model_config(model, sha256(folder / WEIGHTS)), indent=2) + "\n")
    return folder


def model_config(model: Classifier, weights_sha256: str | None = None) -> dict[str, Any]:
    """Content of ``config.json``."""
    backbone, policy = model.backbone, model.image_policy
    cfg = dict(backbone.pretrained_cfg)
    shown = {
        key: cfg[key]
        for key in ("pool_size", "first_conv", "classifier", "license", "fixed_input_size")
        if cfg.get(key) is not None
    }
    return {
        "architecture": model.architecture,
        "num_classes": model.num_classes,
        "num_features": backbone.num_features,
        **({"label_names": list(model.label_names)} if model.label_names else {}),
        "model_args": model.model_args,
        "pretrained_cfg": {
            "tag": model.lineage.get("tag", "cartl_hub"),
            "input_size": [policy.num_channels, *policy.size],
            "mean": model.mean.flatten().tolist(),
            "std": model.std.flatten().tolist(),
            "interpolation": policy.interpolation,
            "crop_pct": policy.crop_pct,
            "crop_mode": policy.crop_mode,
            "num_classes": model.num_classes,
            **shown,
        },
        "cartl_hub": {
            "format_version": FORMAT_VERSION,
            "input_range": [0.0, 1.0],
            "image_policy": policy_to_dict(policy),
            "blocks": [block.name for block in list_blocks(model)],
            "weights_sha256": weights_sha256,
            "lineage": model.lineage,
        },
    }


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank())


# Load


def read_model(folder: Path) -> Classifier:
    """The model in a folder, in eval mode.

    Raises:
        ModelError: If it is damaged, or isn't what its config says; no weight is used before that is known.
    """
    config = read_config(folder)
    own = config.get("cartl_hub", {})
    try:
        model = build_model(config)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"the config of {folder} doesn't make a {config.get('architecture')}: {error}") from error
    state = _read_weights(folder / WEIGHTS, own.get("weights_sha256"))
    _check_state(state, model.backbone.state_dict(), folder)
    model.backbone.load_state_dict(state)
    model.lineage = dict(own.get("lineage", {}))
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, checked."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"expected JSON in {folder / CONFIG}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"expected timm's schema with an 'architecture' in {folder / CONFIG}.")
    own = config.get("cartl_hub", {})
    if not isinstance(own, dict) or not isinstance(own.get("format_version", 1), int):
        raise ModelError(f"expected a mapping with a format_version under 'cartl_hub' in {folder / CONFIG}.")
    if own.get("format_version", 1) > FORMAT_VERSION:
        raise ModelError(
            f"expected format version {FORMAT_VERSION} or older in {folder / CONFIG}, got {own['format_version']}; "
            "upgrade cartl_hub."
        )
    if not timm.is_model(config["architecture"]):
        name = config["architecture"]
        raise ModelError(f"{folder / CONFIG}: timm {timm.__version__} has no architecture {name!r}; upgrade timm.")
    return config


def build_model(config: Mapping[str, Any]) -> Classifier:
    """The network that a config describes, with weights of its initialisation.

    Raises:
        ValueError: On arguments that are no part of an architecture, or sizes out of range.
    """
    args = config.get("model_args") or {}
    if not isinstance(args, Mapping) or not all(isinstance(value, _PLAIN) for value in args.values()):
        raise ValueError(f"model_args must be a mapping of plain values, got {args!r}.")
    if foreign := sorted(set(args) & {*NOT_BUILT, "scriptable", "exportable", "no_jit"}):
        raise ValueError(f"model_args must describe an architecture, got {', '.join(foreign)}.")
    cfg = config["pretrained_cfg"]
    overlay = {
        key: cfg[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size")
        if key in cfg
    } | {"license": cfg.get("license")}  # the architecture's own says nothing of these weights
    policy = config.get("cartl_hub", {}).get("image_policy")
    _check_sizes([args, overlay.get("input_size"), policy, config["num_classes"]])
    model = create_model(config["architecture"], num_classes=int(config["num_classes"]), pretrained_cfg_overlay=overlay, **args)
    if policy is not None:
        model.image_policy = ImagePolicy(**policy | {"size": tuple(policy["size"])})
    names = config.get("label_names")
    if names is not None:
        if len(names) != model.num_classes:
            raise ValueError(f"expected {model.num_classes} label names, got {len(names)}.")
        model.label_names = tuple(map(str, names))
    return model


def _check_sizes(value: Any) -> None:
    """Every number in a part of a config, before memory is taken for it."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_sizes(item)
    elif isinstance(value, (int, float)) and not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"expected sizes and counts up to {_LARGEST}, got {value}.")


def _read_weights(path: Path, expected: str | None) -> dict[str, Tensor]:
    """Weights from a safetensors file whose header and hash are right."""
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"expected weights in {path}: {error}") from error
    if start.startswith(_PICKLES):
        raise ModelError(
            f"expected a safetensors file in {path}, got a pickle, which can run code when it is read; "
            "convert it to safetensors where you trust it."
        )
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or start[8:9] != b"{" or length > size - 8:
        raise ModelError(f"expected a safetensors file in {path}, got {size} bytes that are none, or are cut off; get it again.")
    if expected is not None and (found := sha256(path)) != expected:
        raise ModelError(f"expected weights with sha256 {expected} in {path}, as its config says, got {found}; get them again.")
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError and what its reader raises on odd headers
        raise ModelError(f"expected a whole safetensors file in {path}: {error}; get it again.") from error


def _check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path) -> None:
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise ModelError(
            f"the weights in {folder} are not those of its architecture: "
            f"{len(missing)} missing ({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])})."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{name} in {folder}: expected shape {list(expected[name].shape)}, got {list(tensor.shape)}.")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ModelError(f"{name} in {folder}: expected dtype {expected[name].dtype}, got {tensor.dtype}.")
