"""A model folder to the Hub, in one commit."""

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card import render_card
from .files import sha256, write_file
from .folder import CARD, CONFIG, WEIGHTS, ModelError, read_model, read_report
from .hub import LIBRARY, explained, retried
from .report import FILES

PUBLISHED = (WEIGHTS, CONFIG, CARD, *FILES, "losses.csv", "recipe.yaml")
PICTURES = (".png", ".svg")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")


class PublishError(ModelError):
    """A model that can't be published; the message says what is wrong, and how to try again."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes to the Hub.

    Args:
        repo_id: "org/name".
        folder: It is copied from here.
        files: Sizes in bytes, by name.
        left_out: Other files of the folder, which stay where they are.
        metadata: Of the card, as the Hub reads it.
    """

    repo_id: str
    folder: Path
    files: dict[str, int]
    left_out: tuple[str, ...]
    metadata: dict[str, Any]


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Put a model folder on the Hub in one commit; the folder stays as it is.

    The card is written anew for ``repo_id``, unless it was edited by hand.

    Args:
        folder: That :func:`save_model`, ``RobustFineTuner.save`` or ``pretrain`` wrote.
        repo_id: "org/name", or a name in the user's own namespace; made where it doesn't exist.
        private: For a new repository; by default what the organisation has set.
        revision: Branch; made where it doesn't exist.
        create_pr: Open a pull request instead.
        commit_message: "Upload" and the model's name by default.
        token: By default the stored one.

    Raises:
        PublishError: If the folder is no whole model, the card's metadata is wrong, or the Hub refuses; nothing is half done
            then, and the message holds the command that tries again.
    """
    folder = Path(folder)
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    _check_repo_id(repo_id)
    retry = shlex.join(
        ["cartl-hub", "publish", str(folder), "--to", repo_id]
        + (["--private"] if private else [])
        + (["--revision", revision] if revision else [])
        + (["--create-pr"] if create_pr else [])
    )
    with _kept(folder, repo_id, retry):
        full_id = repo_id if "/" in repo_id else _full_id(repo_id, _user(api))
    with _prepared(folder, full_id) as prepared, _kept(folder, full_id, retry):
        retried(lambda: api.create_repo(full_id, private=private, exist_ok=True))
        if revision not in (None, "main") and not create_pr:
            retried(lambda: api.create_branch(full_id, branch=str(revision), exist_ok=True))

        def upload() -> CommitInfo:
            return api.upload_folder(
                repo_id=full_id,
                folder_path=prepared,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message or f"Upload {folder.resolve().name}",
            )

        # a commit whose reply was lost is found done by the second attempt; a second pull request would be one too many
        return upload() if create_pr else retried(upload)


def plan(folder: str | Path, repo_id: str) -> Upload:
    """What :func:`publish` would send; nothing is sent.

    Raises:
        PublishError: If the folder can't be published.
    """
    folder = Path(folder)
    _check_repo_id(repo_id)
    with _prepared(folder, repo_id) as prepared:
        files = {path.name: path.stat().st_size for path in sorted(prepared.iterdir())}
        metadata = ModelCard((prepared / CARD).read_text(encoding="utf-8")).data.to_dict()
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in files))
    return Upload(repo_id=repo_id, folder=folder, files=files, left_out=left_out, metadata=metadata)


def check_publishable(repo_id: str, card: str, *, token: str | bool | None = None) -> str:
    """That a model could be published: id, card, token, and the right to write; nothing is made or changed.

    Args:
        repo_id: "org/name", or a name in the user's own namespace.
        card: Text of its README.md.
        token: By default the stored one.

    Returns:
        "org/name".

    Raises:
        PublishError: If not.
    """
    _check_repo_id(repo_id)
    _check_card(card)
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    with _kept(None, repo_id, None):
        user = _user(api)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise PublishError(f"expected a token that may write to {repo_id}, got one that may only read; {_LOGIN}.")
        repo_id = _full_id(repo_id, user)
        try:
            retried(lambda: api.auth_check(repo_id, write=True))
        except RepositoryNotFoundError:
            namespaces = [user["name"], *(org["name"] for org in user.get("orgs", ()))]
            if repo_id.partition("/")[0] not in namespaces:
                raise PublishError(
                    f"expected a repository of {' or '.join(namespaces)}, for whom this token can write, got {repo_id!r}."
                ) from None
    return repo_id


def _user(api: HfApi) -> dict[str, Any]:
    """Whose token it is."""
    try:
        return retried(api.whoami)
    except LocalTokenNotFoundError as error:
        raise PublishError(f"expected a token of the Hub, got none; {_LOGIN}.") from error
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        raise PublishError(f"expected a valid token of the Hub, got one that it refuses; {_LOGIN}.") from error


def _full_id(repo_id: str, user: Mapping[str, Any]) -> str:
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise PublishError(f"expected a Hub id 'org/name': {error}") from error


def _check_card(text: str) -> None:
    """What the Hub's own validation would refuse, as far as it can be known without it."""
    try:
        ModelCard(text)  # reads the results in the metadata too
        head = REGEX_YAML_BLOCK.search(text)
        data = (yaml.safe_load(head.group(2)) if head else None) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise PublishError(f"expected metadata in YAML at the head of {CARD}: {error}") from error
    for key, kinds in (("license", (str,)), ("tags", (list,)), ("datasets", (list, str)), ("base_model", (list, str))):
        value = data.get(key)
        if value is not None and not isinstance(value, kinds):
            raise PublishError(f"expected {' or '.join(kind.__name__ for kind in kinds)} for {key!r} in {CARD}, got {value!r}.")


@contextmanager
def _prepared(folder: Path, repo_id: str) -> Iterator[Path]:
    """A temporary copy of what is published, whole and checked."""
    try:
        model = read_model(folder)
        report = read_report(folder)
    except ValueError as error:
        raise PublishError(f"{folder} can't be published: {error}") from error
    measured = None if report is None else report.context.get("weights_sha256")
    if measured is not None and measured != sha256(folder / WEIGHTS):
        raise PublishError(f"expected a report of the weights in {folder}, got one of others; evaluate them again.")
    with tempfile.TemporaryDirectory(prefix="cartl_hub-") as temporary:
        target = Path(temporary)
        for path in sorted(folder.iterdir()):
            if path.name not in PUBLISHED and path.suffix not in PICTURES:
                continue
            if path.is_symlink() or not path.is_file():
                raise PublishError(f"expected files in {folder}, got {path.name}, which is a link or a folder; put a copy there.")
            _copy(path, target / path.name)
        card = folder / CARD
        given = card.read_text(encoding="utf-8") if card.exists() else None
        if given is None or given == render_card(model, report=report):
            write_file(target / CARD, render_card(model, report=report, repo_id=repo_id))
        _check_card((target / CARD).read_text(encoding="utf-8"))
        for path in target.iterdir():
            if path.name != WEIGHTS and _TOKEN.search(path.read_bytes()):
                raise PublishError(f"{folder / path.name} holds what looks like a token of the Hub; remove it.")
        yield target


def _copy(source: Path, target: Path) -> None:
    """The same file under another name where the disk allows it, as weights can be large; it is only read."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _kept(folder: Path | None, repo_id: str, retry: str | None) -> Iterator[None]:
    """Errors of the Hub's client, with where the model lies and how to go on."""
    try:
        with explained(f"the repository {repo_id!r}"):
            yield
    except PublishError:
        raise
    except ValueError as error:
        again = "" if retry is None else f" Nothing was lost: the model is in {folder}. To try again: {retry}"
        raise PublishError(f"{error}{again}") from error
