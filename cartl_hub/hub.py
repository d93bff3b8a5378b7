"""A model as a folder: weights, config, report and card; in ``model_cards/``, on a disk, or on the Hub.

The folder is timm's own format: ``model.safetensors`` with timm's keys, ``config.json`` in timm's schema. What timm has no
place for lies under the key "cartl_hub" of the config.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from .blocks import list_blocks
from .images import ImagePolicy, policy_to_dict
from .models import Classifier, create_model
from .report import Report

FORMAT_VERSION = 1
WEIGHTS, CONFIG, REPORT, CARD = "model.safetensors", "config.json", "report.json", "README.md"
_MODEL_ARGS = (str, int, float, bool, type(None), list)
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
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
    temporary = folder / (WEIGHTS + ".partial")
    # one entry, as safetensors writes several in random order; by way of bytes, as its save_file lets the owner alone read
    temporary.write_bytes(serialise(state, {"format": "pt"}))
    os.replace(temporary, folder / WEIGHTS)
    if report is not None:
        report.save(folder)
    if card is not None:
        write_text(folder / CARD, card)
    write_text(folder / CONFIG, json.dumps(model_config(model, _sha256(folder / WEIGHTS)), indent=2) + "\n")
    return folder


def model_config(model: Classifier, sha256: str | None = None) -> dict[str, Any]:
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
            "crop_pct": 1.0,
            "crop_mode": policy.crop_mode,
            "num_classes": model.num_classes,
            **shown,
        },
        "cartl_hub": {
            "format_version": FORMAT_VERSION,
            "input_range": [0.0, 1.0],
            "image_policy": policy_to_dict(policy),
            "blocks": [block.name for block in list_blocks(model)],
            "weights_sha256": sha256,
            "lineage": model.lineage,
        },
    }


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank())


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Load


def load_model(name: str | Path, *, revision: str | None = None, device: str | torch.device = "cpu") -> Classifier:
    """A saved model: images in [0, 1] in, logits out, in eval mode.

    Args:
        name: A folder, the id of a bundled model (:func:`list_sources`), or a Hub id "org/name".
        revision: Commit, branch or tag on the Hub.
        device: Where to put it.

    Raises:
        ModelError: If it can't be found, is damaged, or isn't what its config says; no weight is used before that is known.
    """
    folder, origin = find_model(name, revision)
    config = read_config(folder)
    own = config.get("cartl_hub", {})
    try:
        model = build_model(config)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"the config of {folder} doesn't make a {config.get('architecture')}: {error}") from error
    state = _read_weights(folder / WEIGHTS, own.get("weights_sha256"))
    _check_state(state, model.backbone.state_dict(), folder)
    model.backbone.load_state_dict(state)
    model.lineage = dict(own.get("lineage", {})) | {"loaded_from": origin}
    return model.to(device).eval()


def find_model(name: str | Path, revision: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Folder of a model, and where it came from, as a lineage records it."""
    path = Path(name)
    if (path / CONFIG).exists():
        return path, {"id": path.resolve().name}
    bundled = bundled_models()
    if str(name) in bundled:
        return bundled[str(name)], {"id": str(name), "bundled": True}
    if path.is_dir():
        raise ModelError(f"expected {CONFIG} and {WEIGHTS} in {path}, got {sorted(item.name for item in path.iterdir())[:10]}.")
    if path.is_file():
        raise ModelError(f"expected a model folder with {CONFIG} and {WEIGHTS}, got the file {path}.")
    if str(name).count("/") != 1:
        raise ModelError(
            f"expected a folder, a Hub id 'org/name' or one of {', '.join(bundled) or 'no bundled models'}, got {str(name)!r}."
        )
    return _download(str(name), revision)


def _download(repo_id: str, revision: str | None) -> tuple[Path, dict[str, Any]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS, CONFIG, REPORT, CARD]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise ModelError(f"the model {repo_id!r} can't be had from the Hub: {error}") from error
    if not (folder / CONFIG).exists():
        raise ModelError(f"expected {CONFIG} and {WEIGHTS} in the Hub repository {repo_id}, got a repository without them.")
    return folder, {"id": repo_id, "revision": folder.name}


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
    """The network that a config describes, with weights of its initialisation."""
    args = config.get("model_args") or {}
    if not isinstance(args, Mapping) or not all(isinstance(value, _MODEL_ARGS) for value in args.values()):
        raise ValueError(f"model_args must be a mapping of plain values, got {args!r}.")
    cfg = config["pretrained_cfg"]
    overlay = {
        key: cfg[key]
        for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size")
        if key in cfg
    }
    policy = config.get("cartl_hub", {}).get("image_policy")
    model = create_model(config["architecture"], num_classes=int(config["num_classes"]), pretrained_cfg_overlay=overlay, **args)
    if policy is not None:
        model.image_policy = ImagePolicy(**policy | {"size": tuple(policy["size"])})
    names = config.get("label_names")
    if names is not None:
        if len(names) != model.num_classes:
            raise ValueError(f"expected {model.num_classes} label names, got {len(names)}.")
        model.label_names = tuple(map(str, names))
    return model


def _read_weights(path: Path, sha256: str | None) -> dict[str, Tensor]:
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
    if sha256 is not None and (found := _sha256(path)) != sha256:
        raise ModelError(f"expected weights with sha256 {sha256} in {path}, as its config says, got {found}; get them again.")
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


# Find


def bundled_models() -> dict[str, Path]:
    """Folders of the models that came with the package or lie in its checkout, by id."""
    package = Path(__file__).parent
    found: dict[str, Path] = {}
    for parent in (package / "bundled", package.parent / "model_cards"):
        if parent.is_dir():
            found |= {folder.name: folder for folder in sorted(parent.iterdir()) if (folder / CONFIG).exists()}
    return found


@dataclass(frozen=True)
class SourceInfo:
    """One line of the table of models.

    Args:
        id: Under which :func:`load_model` finds it.
        architecture: timm's name.
        num_parameters: Of the backbone with its classifier.
        data: What it was trained on.
        method: How.
        clean_acc: Accuracy on the test split, in [0, 1]; None where there is no report.
        robust_acc: Under ``attack``.
        attack: Name of the attack with its radius.
        num_images: Test images of these figures.
        size: Of the weights, in bytes.
        folder: Where it lies.
    """

    id: str
    architecture: str
    num_parameters: int
    data: str
    method: str
    clean_acc: float | None
    robust_acc: float | None
    attack: str | None
    num_images: int | None
    size: int
    folder: Path


def list_sources() -> list[SourceInfo]:
    """The bundled models with what was measured of them."""
    return [_source_info(model_id, folder) for model_id, folder in bundled_models().items()]


def _source_info(model_id: str, folder: Path) -> SourceInfo:
    config = read_config(folder)
    lineage = config.get("cartl_hub", {}).get("lineage", {})
    with torch.device("meta"):
        backbone = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config.get("model_args", {}))
    report = Report.load(folder) if (folder / REPORT).exists() else None
    attack = next((name for name in ("PGD-20", "PGD-100") if report and name in report.attacks), None)
    return SourceInfo(
        id=model_id,
        architecture=config["architecture"],
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        data=str(lineage.get("data", {}).get("id", "unknown")),
        method=str(lineage.get("method", {}).get("name", "unknown")),
        clean_acc=report.clean.accuracy if report else None,
        robust_acc=report.attacks[attack].accuracy if report and attack else None,
        attack=f"{attack}, {report.attacks[attack].threat}" if report and attack else None,
        num_images=report.num_images if report else None,
        size=(folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).exists() else 0,
        folder=folder,
    )


def models_table() -> str:
    """The bundled models as a Markdown table."""
    lines = [
        "| id | architecture | parameters | trained on | method | clean | robust | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for info in list_sources():
        measured = [
            "not measured" if share is None else f"{100 * share:.2f} %{suffix}"
            for share, suffix in ((info.clean_acc, ""), (info.robust_acc, f" ({info.attack})"))
        ]
        lines.append(
            f"| [{info.id}](model_cards/{info.id}/README.md) | {info.architecture} | {info.num_parameters:,} | {info.data} | "
            f"{info.method} | {' | '.join(measured)} | {info.size / 1e6:.1f} |"
        )
    return "\n".join(lines)
