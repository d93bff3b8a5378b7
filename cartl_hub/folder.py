"""A model as a folder: weights, config, report and card.

It is timm's own format: ``model.safetensors`` with timm's keys, ``config.json`` in timm's schema. What timm has no place for is
under the key "cartl_hub" of the config.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from .blocks import list_blocks
from .files import sha256, write_files
from .images import ImagePolicy, policy_to_dict
from .lineage_schema import check_lineage
from .models import Classifier, create_model
from .models.settings import check_model_args, check_normalisation, check_sizes
from .modules import check_finite, eval_mode, not_finite
from .processes import is_main_process
from .report import FILES, Report
from .weights import plain_state, stored_dtype, weights_bytes

FORMAT_VERSION = 1
WEIGHTS, CONFIG, REPORT, CARD = "model.safetensors", "config.json", "report.json", "README.md"
_CONFIG_BYTES = 16 << 20
_SEEN = ("input_size", "mean", "std", "interpolation", "crop_mode", "crop_pct")  # how a model sees images, in timm's config
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class ModelError(ValueError):
    """A model that can't be loaded; the message says what was expected, what was found, and what to do."""


# Save


def save_model(model: Classifier, folder: str | Path, *, report: Report | None = None, card: str | None = None) -> Path:
    """Write ``model.safetensors`` and ``config.json``, and the report and the card if given.

    Weights, config and card are replaced together; a report of another model that is already there is removed. Of several
    processes the first one writes.

    Args:
        model: Model with plain weights; save a model under training only once training has ended.
        folder: Folder to write to; created if it doesn't exist.
        report: Report on these weights.
        card: Text of README.md.

    Raises:
        ValueError: If weights are reparametrised, shared or not finite, the report is on other weights, the folder is a file or
            holds something else, or the model that is loaded back would be another one; nothing is written then.
    """
    folder = Path(folder)
    check_target(folder)
    if not is_main_process():
        return folder
    check_weights(model)
    check_rebuilt(model)
    weights = weights_bytes(model)
    digest = hashlib.sha256(weights).hexdigest()
    if report is not None and not report.is_of(digest):
        measured = report.context["weights_sha256"][:12]
        raise ValueError(f"expected a report of these weights ({digest[:12]}), got one of others ({measured}); evaluate again.")
    config = model_config(model, digest)
    _check_config(config, config["cartl_hub"])
    _check_labels(config)
    folder.mkdir(parents=True, exist_ok=True)
    kept = report is None and _measured_as(folder, config)
    contents: dict[Path, bytes | str] = {
        folder / WEIGHTS: weights,
        folder / CONFIG: json.dumps(config, indent=2, allow_nan=False) + "\n",
    }
    write_files(contents if card is None else contents | {folder / CARD: card})
    if report is not None:
        report.save(folder)
    elif not kept:
        _forget_report(folder)
    return folder


def check_weights(model: Classifier) -> None:
    """Check that weights can be saved.

    Raises:
        ValueError: If they are reparametrised, shared by several layers, or not finite.
    """
    state = plain_state(model)
    names: dict[int, str] = {}
    for name, parameter in model.backbone.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(id(parameter), name)) != name:
            raise ValueError(f"expected weights of one layer each, got one for both {other} and {name}; give one of them a copy.")
    if reparametrised := next((name for name in state if ".parametrizations." in name), None):
        raise ValueError(
            f"expected plain weights, got the reparametrised {reparametrised}; remove that, or wait until training has ended."
        )
    check_finite(state)


def check_rebuilt(model: Classifier) -> None:
    """Check that a network built from the model's config computes what the model does: only so is it the one that was measured.

    Raises:
        ValueError: If it doesn't.
    """
    images = torch.rand(2, model.image_policy.num_channels, *model.image_policy.size, generator=torch.Generator().manual_seed(0))
    remedy = (
        f"make it with cartl_hub.create_model({model.architecture!r}, ...), which keeps the arguments, or state them: "
        "cartl_hub.Classifier(backbone, model_args={...})"
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(model):
        try:
            again = build_model(json.loads(json.dumps(model_config(model))))
            again.backbone.load_state_dict(model.backbone.state_dict())
        except Exception as error:  # whatever an architecture makes of other arguments
            raise ValueError(
                f"expected a {model.architecture} with the arguments {model.model_args}, got another network ({error}); {remedy}."
            ) from error
        again = again.to(model.mean.device).eval()
        logits, expected = again(images.to(model.mean.device)).float(), model(images.to(model.mean.device)).float()
    if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise ValueError(
            f"expected a {model.architecture} with the arguments {model.model_args}, got a network with other logits than that; "
            f"{remedy}."
        )


def check_target(folder: Path) -> None:
    """Check that no foreign file would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder to save the model in, got the file {folder}.")
    with suppress(OSError, ValueError, AttributeError):
        if "cartl_hub" in json.loads((folder / CONFIG).read_bytes()):
            return
    if foreign := [name for name in (CONFIG, CARD) if (folder / name).exists()]:
        raise ValueError(f"expected a new folder or a model folder of cartl_hub, got {folder} with a foreign {foreign[0]}.")


def _measured_as(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the report in a folder is one of this model: of the same weights, which saw images in the same way."""
    try:
        was, report = json.loads((folder / CONFIG).read_bytes()), json.loads((folder / REPORT).read_bytes())
        seen = [[content["pretrained_cfg"].get(name) for name in _SEEN] for content in (was, config)]
        built = [[content.get(name) for name in ("architecture", "model_args", "label_names")] for content in (was, config)]
        return (
            seen[0] == seen[1]
            and built[0] == built[1]
            and report["context"].get("weights_sha256") == config["cartl_hub"]["weights_sha256"]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _forget_report(folder: Path) -> None:
    """Remove a report of another model."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def stated_weights(folder: Path) -> str | None:
    """Hash of a model's weights, as its config states it."""
    return read_config(folder).get("cartl_hub", {}).get("weights_sha256")


def read_report(folder: Path) -> Report | None:
    """The report in a model folder, if there is one.

    Raises:
        ValueError: If it can't be read.
    """
    return Report.load(folder) if (folder / REPORT).exists() else None


def model_config(model: Classifier, weights_sha256: str | None = None) -> dict[str, Any]:
    """Content of ``config.json``."""
    backbone, policy = model.backbone, model.image_policy
    cfg = dict(backbone.pretrained_cfg)
    shown = {
        key: cfg[key]
        for key in ("pool_size", "first_conv", "classifier", "license", "fixed_input_size")
        if cfg.get(key) is not None
    }
    if "license" in model.lineage:  # of these weights, which need not be that of those they were made from
        shown["license"] = model.lineage["license"]
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


# Load


def read_model(folder: Path) -> Classifier:
    """The model in a folder, in eval mode.

    Raises:
        ModelError: If it is damaged, or isn't what its config says; no weight is used before that is known.
    """
    config = read_config(folder)
    own = config.get("cartl_hub", {})
    state = _read_weights(folder / WEIGHTS, own.get("weights_sha256"))
    with _building(folder, config):
        with suppress(NotImplementedError), torch.device("meta"):  # takes no memory; a few networks compute when they are built
            _check_state(state, build_model(config).backbone.state_dict(), folder)
        model = build_model(config)
    _check_state(state, model.backbone.state_dict(), folder)
    if broken := not_finite(state):
        raise ModelError(f"{broken} in {folder}: expected finite weights, got NaN or infinite values.")
    model.backbone.load_state_dict(state)
    model.stored_as = stored_dtype(state)
    model.lineage = dict(own.get("lineage", {}))
    return model.eval()


def read_untrained(folder: Path) -> Classifier:
    """The network of a model in a folder, with freshly initialised weights.

    Raises:
        ModelError: If no network can be built from its config.
    """
    config = read_config(folder)
    with _building(folder, config):
        return build_model(config)


@contextmanager
def _building(folder: Path, config: Mapping[str, Any]) -> Iterator[None]:
    """Name the config from which no network can be built."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # whatever an architecture makes of arguments that nobody has checked
        raise ModelError(
            f"the config of {folder} doesn't make a {config['architecture']}: {str(error) or repr(error)}"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, checked as far as possible without its network.

    Raises:
        ModelError: If this version can't read it.
    """
    path = folder / CONFIG
    try:
        if not path.is_file():
            raise ModelError(f"expected a model folder with a {CONFIG}, got {folder} without one.")
        if path.stat().st_size > _CONFIG_BYTES:
            raise ModelError(f"expected at most {_CONFIG_BYTES >> 20} MB in {path}, got {path.stat().st_size >> 20} MB.")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"expected JSON in {path}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"expected timm's schema with an 'architecture' in {path}.")
    own = config.get("cartl_hub", {})
    if not isinstance(own, dict) or not isinstance(own.get("format_version", 1), int):
        raise ModelError(f"expected a mapping with a format_version under 'cartl_hub' in {path}.")
    if own.get("format_version", 1) > FORMAT_VERSION:
        raise ModelError(
            f"expected format version {FORMAT_VERSION} or older in {path}, got {own['format_version']}; upgrade cartl_hub."
        )
    if not timm.is_model(config["architecture"]):
        name = config["architecture"]
        raise ModelError(f"{path}: timm {timm.__version__} has no architecture {name!r}; upgrade timm.")
    try:
        _check_config(config, own)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: {error}") from error
    return config


def _check_config(config: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    check_lineage(own.get("lineage", {}))
    args, cfg, policy = config.get("model_args") or {}, config.get("pretrained_cfg"), own.get("image_policy", {})
    check_model_args(args)
    if args.get("num_classes", config.get("num_classes")) != config.get("num_classes"):
        raise ValueError(f"expected {config.get('num_classes')} as num_classes of model_args too, got {args['num_classes']!r}.")
    if not isinstance(cfg, dict) or not isinstance(policy, dict):
        raise ValueError("expected mappings as pretrained_cfg and image_policy.")
    if isinstance(config.get("num_classes"), bool) or not isinstance(config.get("num_classes"), int):
        raise ValueError(f"expected a whole number as num_classes, got {config.get('num_classes')!r}.")
    check_sizes([cfg.get("input_size"), policy, config["num_classes"]])
    check_normalisation(cfg.get("mean"), cfg.get("std"))
    names = config.get("label_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(f"expected a list of strings as label_names, got {names!r:.200}.")


def build_model(config: Mapping[str, Any]) -> Classifier:
    """The network that a config describes, with freshly initialised weights.

    Args:
        config: Config that :func:`read_config` has checked.

    Raises:
        ValueError: If label names or image policy don't fit the network.
    """
    cfg = config["pretrained_cfg"]
    args = {key: value for key, value in (config.get("model_args") or {}).items() if key != "num_classes"}
    kept = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "pool_size")
    # the license is that of these weights, not the architecture's own
    overlay = {key: cfg[key] for key in kept if key in cfg} | {"license": cfg.get("license")}
    policy = config.get("cartl_hub", {}).get("image_policy")
    model = create_model(config["architecture"], num_classes=config["num_classes"], pretrained_cfg_overlay=overlay, **args)
    if policy is not None:
        image_policy = ImagePolicy(**policy | {"size": tuple(policy["size"])})
        if image_policy.num_channels != model.image_policy.num_channels:
            raise ValueError(
                f"expected pictures with {model.image_policy.num_channels} channels, got mode {image_policy.mode!r}."
            )
        model.image_policy = image_policy
    _check_labels(config)
    if config.get("label_names") is not None:
        model.label_names = tuple(config["label_names"])
    return model


def _check_labels(config: Mapping[str, Any]) -> None:
    names, expected = config.get("label_names"), config["num_classes"]
    if names is not None and (len(names) != expected or len(set(names)) != len(names)):
        raise ValueError(f"expected {expected} different label names, one for each class, got {len(set(names))}.")


def _read_weights(path: Path, expected: str | None) -> dict[str, Tensor]:
    """Weights from a safetensors file, with its header and hash verified."""
    try:
        if not path.is_file():
            raise ModelError(f"expected weights in {path}, which is no file.")
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
