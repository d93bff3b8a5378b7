"""Sources of models: a folder, the package itself, or the Hub."""

import glob
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from .folder import CARD, CONFIG, REPORT, WEIGHTS, ModelError, build_model, read_config, read_model, read_report
from .models import Classifier
from .recipe import RECIPE, load_recipe
from .weights import weights_sha256

logger = logging.getLogger(__name__)
T = TypeVar("T")

LIBRARY = "cartl_hub"
HEADLINE_ATTACKS = ("PGD-20", "PGD-100", "PGD-20 L2", "PGD-100 L2")  # that stand beside the worst case, the first that was run
RECIPE_ONLY = "recipe only"  # where a model is that is not trained yet
ATTEMPTS = 3  # of what the client itself does not try again: downloads that end in a 5xx or a reset, and small requests
_GARBLED = (json.JSONDecodeError, KeyError, TypeError, AttributeError)  # what the client makes of a damaged reply
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".tar")


# Load


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Classifier:
    """Load a saved model: images in [0, 1] in, logits out, in eval mode.

    Args:
        name: Folder, id of a bundled model (:func:`list_sources`), or Hub id "org/name".
        revision: Commit, branch or tag on the Hub.
        device: Device to put the model on.
        token: Token of the Hub; by default the stored one.
        cache_dir: Cache of the Hub's client.
        force_download: Download it again even if it is cached.
        local_files_only: Use cached files only, without network access; the environment variable ``HF_HUB_OFFLINE`` does the
            same.

    Raises:
        ModelError: If it can't be found, is damaged, or isn't what its config says; no weight is used before that is known.
    """
    folder, origin = find_model(
        name,
        revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
    return open_folder(folder, origin).to(device)


def open_folder(folder: Path, origin: Mapping[str, Any]) -> Classifier:
    """The model in a folder that :func:`find_model` found, with its origin in its lineage."""
    model = read_model(folder)
    model.lineage |= {"loaded_from": {**origin, "weights_sha256": weights_sha256(model)}}
    return model


def find_model(name: str | Path, revision: str | None = None, **client: Any) -> tuple[Path, dict[str, Any]]:
    """Folder of a model, and its origin as a lineage records it.

    Args:
        name: Name of the model, as for :func:`load_model`.
        revision: Commit, branch or tag on the Hub, where the model then must be.
        client: Further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        ModelError: If there is no such model or file.
    """
    if revision is None and (found := _find_here(name)):
        return found
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        if revision is not None:
            raise ModelError(f"expected a Hub id 'org/name' with revision={revision!r}, got {str(name)!r}; leave revision out.")
        known = ", ".join(bundled_models()) or "no bundled models"
        raise ModelError(f"expected a folder, a Hub id 'org/name' or one of {known}, got {str(name)!r}.")
    try:
        folder = download(str(name), revision, files=(WEIGHTS, CONFIG, REPORT, CARD), **client)
    except ModelError as error:
        raise ModelError(f"{error} There is no folder {str(name)!r} here either.") from error.__cause__
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise ModelError(_incomplete(str(name), folder, client))
    return folder, {"id": str(name), "revision": folder.name}


def _find_here(name: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """A model folder or a bundled model; None if there is nothing of that name."""
    if not str(name).strip():
        return None
    path = Path(name)
    if (path / CONFIG).exists():
        return path, {"id": path.resolve().name}
    if bundled := bundled_models().get(str(name)):
        return bundled, {"id": str(name), "bundled": True}
    if recipe := untrained_recipes().get(str(name)) or (path if (path / RECIPE).exists() else None):
        raise ModelError(
            f"expected a trained model, got {str(name)!r}, of which there is a recipe only: "
            f"`cartl-hub pretrain {recipe / RECIPE}` makes it."
        )
    if path.is_dir():
        raise ModelError(f"expected {CONFIG} and {WEIGHTS} in {path}, got {sorted(item.name for item in path.iterdir())[:10]}.")
    if path.is_file():
        raise ModelError(f"expected a model folder with {CONFIG} and {WEIGHTS}, got the file {path}.")
    return None


def download(repo_id: str, revision: str | None, *, files: Sequence[str], **client: Any) -> Path:
    """Download files of one commit of a model repository on the Hub into the client's cache, and verify their hashes.

    Args:
        repo_id: "org/name".
        revision: Commit, branch or tag.
        files: Names of the files; those that the repository lacks are left out.
        client: Further arguments of ``huggingface_hub.snapshot_download``.

    Returns:
        The folder of the commit, named after it.

    Raises:
        ModelError: If they can't be obtained, or arrive damaged twice.
    """

    def fetch(commit: str | None) -> Path:
        return Path(
            retried(
                lambda: snapshot_download(
                    repo_id, revision=commit, allow_patterns=[glob.escape(file) for file in files], library_name=LIBRARY, **client
                )
            )
        )

    with explained(f"the model {repo_id!r}", revision):
        folder = fetch(revision)
        if damaged := _damaged(folder, files):
            logger.warning("%s of %s came damaged and is fetched again", ", ".join(damaged), repo_id)
            folder = fetch(folder.name)
    if damaged and (damaged := _damaged(folder, files)):
        raise ModelError(
            f"expected whole files from the Hub repository {repo_id!r}, got {', '.join(damaged)} with another hash than the Hub "
            "states, twice; try again later or by another network."
        )
    return folder


def find_checkpoint(name: str | Path, revision: str | None = None, **client: Any) -> tuple[Path, dict[str, Any]]:
    """A file of weights on disk or in a repository on the Hub, and its origin.

    Args:
        name: Path of a file, or "org/name/path/of/the/file" on the Hub.
        revision: Commit, branch or tag on the Hub.
        client: Further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        ModelError: If there is no such model or file.
    """
    path = Path(name)
    if path.is_file():
        return path, {}
    parts = str(name).split("/")
    if path.is_absolute() or len(parts) < 3 or any(part in ("", ".", "..") for part in parts):
        raise ModelError(f"expected a file, or one on the Hub as org/name/FILE, got {str(name)!r}, which does not exist.")
    repo_id, file = "/".join(parts[:2]), "/".join(parts[2:])
    folder = download(repo_id, revision, files=(file,), **client)
    if not (folder / file).is_file():
        raise ModelError(f"expected the file {file!r} in the Hub repository {repo_id!r}, which has none of this name.")
    return folder / file, {"repo_id": repo_id, "revision": folder.name}


def _damaged(folder: Path, files: Sequence[str]) -> list[str]:
    """Files whose content is not what the cache names it after; they are removed from the cache.

    The client checks sizes only. It links to a blob that is named after its git hash or, for a large file, after its sha256.
    """
    damaged = []
    for file in map(folder.joinpath, files):
        blob = file.parent / os.readlink(file) if file.is_symlink() else file
        if not file.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size) if len(blob.name) == 40 else hashlib.sha256()
        with open(file, "rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != blob.name:
            damaged.append(file.name)
            for path in (file.resolve(), blob, file):  # what came by xet is a link to a link
                path.unlink(missing_ok=True)
    return damaged


def _incomplete(repo_id: str, folder: Path, client: Mapping[str, Any]) -> str:
    """Message about a repository without a model folder."""
    start = f"expected {CONFIG} and {WEIGHTS} in the Hub repository {repo_id!r}, got "
    try:
        names = HfApi(token=client.get("token")).list_repo_files(repo_id, revision=folder.name)
    except Exception:  # offline: the cache may hold a part only
        return start + "a part of them in the cache and no connection; load it once with one."
    if pickles := sorted(name for name in names if name.endswith(_PICKLES)):
        return start + (
            f"{', '.join(pickles[:3])}, which can run code when it is read; convert it once: "
            + shlex.join(["cartl-hub", "import", f"{repo_id}/{pickles[0]}", "--to", repo_id.rpartition("/")[2]])
        )
    return start + f"{', '.join(sorted(names)[:5]) or 'no files'}."


# The client


@contextmanager
def explained(what: str, revision: str | None = None, *, act: str = "had from the Hub") -> Iterator[None]:
    """Turn errors of the Hub's client into a :class:`ModelError` that says what to do.

    Args:
        what: Name of what was requested.
        revision: Revision that was requested.
        act: Action that failed, for the message.
    """
    start = f"{what} can't be {act}: "
    try:
        yield
    except GatedRepoError as error:
        reason = "its authors ask for consent; give it on its page on the Hub, and log in with `hf auth login`"
        raise ModelError(f"{start}{reason}.") from error
    except RepositoryNotFoundError as error:
        reason = "there is no such repository, or it is private; check the name, and log in with `hf auth login` if it is yours"
        raise ModelError(f"{start}{reason}.") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{what} has no commit, branch or tag {revision!r} on the Hub.") from error
    except OfflineModeIsEnabled as error:
        raise ModelError(f"{start}HF_HUB_OFFLINE is set, so that the Hub is not to be asked; unset it.") from error
    except (LocalEntryNotFoundError, RevisionResolutionError) as error:
        if isinstance(error.__cause__, HfHubHTTPError):  # it was reached
            raise ModelError(f"{start}{http_reason(error.__cause__)}.") from error
        reason = "the Hub can't be reached, or is not to be asked, and the cache holds no copy; connect once, or pass a folder"
        raise ModelError(f"{start}{reason}.") from error
    except HFValidationError as error:
        raise ModelError(f"{start}{error}") from error
    except HfHubHTTPError as error:
        raise ModelError(f"{start}{http_reason(error)}.") from error
    except (HTTPError, EntryNotFoundError, OSError, RuntimeError, *_GARBLED) as error:
        raise ModelError(f"{start}{type(error).__name__}: {error}; try again.") from error


def http_reason(error: HfHubHTTPError) -> str:
    """Status, the server's own words, and what to do."""
    status = error.response.status_code
    said = str(getattr(error, "server_message", None) or "").strip().rstrip(".")
    remedies = {
        401: "the token is not valid, `hf auth login` stores another",
        403: "the token has no right to do this; log in with one that has (`hf auth login`, or HF_TOKEN)",
    }
    remedy = remedies.get(status, "" if said else "try again later")
    return f"it answered {status}" + (f" ({said})" if said else "") + (f"; {remedy}" if remedy else "")


def retried(call: Callable[[], T]) -> T:
    """Result of a call that is repeated after transient failures: 5xx, lost connections, truncated files."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == ATTEMPTS or not _passing(error):
                raise
            logger.info("attempt %d of %d: %s", attempt, ATTEMPTS, type(error).__name__)
            time.sleep(2 ** (attempt - 1))
    raise AssertionError


def _passing(error: Exception) -> bool:
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", 0) in (408, 429, 500, 502, 503, 504)
    if isinstance(error, (LocalEntryNotFoundError, RevisionResolutionError)):  # what the Hub failed to tell is not cached either
        return isinstance(error.__cause__, Exception) and _passing(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled) or type(error).__name__ == "ConnectError":  # of httpx or httpx2, by the client
        return False  # nobody answers, which the client has tried by itself
    return isinstance(error, (HTTPError, ConnectionError, *_GARBLED)) or "Consistency check failed" in str(error)


# Find


def bundled_models() -> dict[str, Path]:
    """Folders of the models that came with the package or lie in its checkout, by id."""
    return _bundled(lambda folder: (folder / CONFIG).exists())


def untrained_recipes() -> dict[str, Path]:
    """Folders with a recipe whose model is not trained yet, by the model's id."""
    return _bundled(lambda folder: (folder / RECIPE).exists() and not (folder / CONFIG).exists())


def _bundled(wanted: Callable[[Path], bool]) -> dict[str, Path]:
    package = Path(__file__).parent
    found: dict[str, Path] = {}
    for parent in (package / "bundled", package.parent / "model_cards"):
        if parent.is_dir():
            found |= {folder.name: folder for folder in sorted(parent.iterdir()) if wanted(folder)}
    return found


@dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """One line of the table of models.

    Args:
        id: Id that :func:`load_model` takes.
        architecture: Name of the architecture in timm.
        num_parameters: Number of parameters, backbone and classifier; None if there is no model yet.
        data: Data that the model was trained on.
        method: Name of the training method.
        threat_model: Norm and radius of ``attack``.
        clean_acc: Accuracy on the test split, in [0, 1]; None if there is no report.
        robust_acc: Accuracy under ``attack``.
        worst_acc: Accuracy in the worst case over all attacks of the threat model.
        attack: Name of the attack.
        doubtful: Whether checks of the report failed; then robust accuracies are left out.
        num_images: Number of test images behind these figures.
        size: Size of the weights, in bytes.
        where: Location: "bundled", "Hub", or "recipe only".
        revision: Commit on the Hub.
    """

    id: str
    architecture: str
    data: str
    method: str
    where: str
    num_parameters: int | None = None
    threat_model: str | None = None
    clean_acc: float | None = None
    robust_acc: float | None = None
    worst_acc: float | None = None
    attack: str | None = None
    doubtful: bool = False
    num_images: int | None = None
    size: int | None = None
    revision: str | None = None


def list_sources(
    *,
    hub: bool = False,
    author: str | None = None,
    search: str | None = None,
    limit: int = 50,
    token: str | bool | None = None,
) -> list[SourceInfo]:
    """List the bundled models, those that only have a recipe, and those on the Hub that this library published.

    Each comes with its measured accuracies.

    Args:
        hub: Search the Hub too, for models with the library's tag. A model that can't be read is named in a warning.
        author: User or organisation on the Hub.
        search: Part of the model's name on the Hub.
        limit: Largest number of models from the Hub, most downloaded first.
        token: Token of the Hub; by default the stored one.

    Raises:
        ModelError: If the Hub can't be reached.
    """
    wanted = (search or "").lower()
    found: list[SourceInfo] = []
    for name, folder in (*bundled_models().items(), *untrained_recipes().items()):
        if wanted not in name.lower():
            continue
        try:
            trained = (folder / CONFIG).exists()
            found.append(_source_info(name, folder, "bundled") if trained else _recipe_info(folder))
        except (OSError, ValueError) as error:
            logger.warning("%s is left out: %s", name, error)
    if not hub:
        return found
    api = HfApi(token=token, library_name=LIBRARY)
    with explained("the list of models"):
        models = retried(
            lambda: list(api.list_models(filter=LIBRARY, author=author, search=search, sort="downloads", limit=limit))
        )
    for model in models:
        try:
            with explained(f"the model {model.id!r}"):
                info = retried(lambda name=model.id: api.model_info(name, files_metadata=True))  # type: ignore[misc]
            folder = download(model.id, info.sha, files=(CONFIG, REPORT), token=token)
            size = next((file.size or 0 for file in info.siblings or () if file.rfilename == WEIGHTS), 0)
            found.append(_source_info(model.id, folder, "Hub", size=size, revision=info.sha))
        except Exception as error:  # whatever others have put there
            logger.warning("%s is left out: %s", model.id, error)
    return found


def _source_info(model_id: str, folder: Path, where: str, *, size: int | None = None, revision: str | None = None) -> SourceInfo:
    config = read_config(folder)
    own = config.get("cartl_hub", {})
    lineage = own.get("lineage", {})
    with torch.device("meta"):
        backbone = build_model(config).backbone
    report = read_report(folder)
    if report and not report.is_of(own.get("weights_sha256")):
        report = None
    doubtful = report is not None and bool(report.failed_checks)
    measured = report.attacks if report and not doubtful else {}
    attack = next((name for name in (*HEADLINE_ATTACKS, *measured) if name in measured), None)
    if size is None:
        size = (folder / WEIGHTS).stat().st_size if (folder / WEIGHTS).exists() else 0
    return SourceInfo(
        id=model_id,
        architecture=config["architecture"],
        num_parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        data=str(lineage.get("data", {}).get("id", "unknown")),
        method=str(lineage.get("method", {}).get("name", "unknown")),
        threat_model=measured[attack].threat if attack else None,
        clean_acc=report.clean.accuracy if report else None,
        robust_acc=measured[attack].accuracy if attack else None,
        worst_acc=report.worst_case[measured[attack].threat].accuracy if report and attack else None,
        attack=attack,
        doubtful=doubtful,
        num_images=report.num_images if report else None,
        size=size,
        where=where,
        revision=revision,
    )


def _recipe_info(folder: Path) -> SourceInfo:
    recipe = load_recipe(folder)
    return SourceInfo(
        id=recipe.id,
        architecture=recipe.architecture,
        data=recipe.data.id,
        method=type(recipe.method).__name__,
        where=RECIPE_ONLY,
    )


def models_table() -> str:
    """The bundled models as a Markdown table, with links from the project's folder."""
    lines = [
        "| id | architecture | parameters | trained on | method | clean | worst case | PGD-20 | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for info in list_sources():
        if info.where == RECIPE_ONLY:
            continue
        assert info.size is not None
        ball = "" if info.threat_model in (None, "Linf 8/255") else f" ({info.threat_model})"
        attack = ball if info.attack in (None, "PGD-20", "PGD-20 L2") else f" ({info.attack}, {info.threat_model})"
        measured = [
            ("checks failed" if info.doubtful else "not measured") if share is None else f"{100 * share:.2f} %{suffix}"
            for share, suffix in ((info.clean_acc, ""), (info.worst_acc, ball), (info.robust_acc, attack))
        ]
        lines.append(
            f"| [{info.id}](model_cards/{info.id}/README.md) | {info.architecture} | {info.num_parameters:,} | {info.data} | "
            f"{info.method} | {' | '.join(measured)} | {info.size / 1e6:.1f} |"
        )
    return "\n".join(lines)


def recipes_table() -> str:
    """The recipes whose models aren't trained yet as a Markdown table, with links from their folder."""
    untrained = [info for info in list_sources() if info.where == RECIPE_ONLY]
    lines = ["| id | architecture | trained on | method | |", "|---|---|---|---|---|"]
    lines += [
        f"| [{info.id}]({info.id}/{RECIPE}) | {info.architecture} | {info.data} | {info.method} | {info.where} |"
        for info in untrained
    ]
    return "\n".join(lines)
