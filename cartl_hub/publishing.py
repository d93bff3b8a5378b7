"""Publishes a model folder on the Hub, in one commit."""

import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card import is_repo_id, render_card
from .config import read_yaml
from .files import sha256, write_file
from .folder import CARD, CONFIG, WEIGHTS, ModelError, read_model, read_report
from .hub import LIBRARY, explained, retried
from .licenses import LICENSES
from .recipe import RECIPE
from .report import FILES

logger = logging.getLogger(__name__)

PUBLISHED = (WEIGHTS, CONFIG, CARD, *FILES, "losses.csv", RECIPE)
PICTURES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
_LOADED_ID = re.compile(r'load_model\("([^"]+)"\)')
_LINK = re.compile(r"""(?:\]\(|src=["'])<?(?:\./)?([^)\s"'>]+)""")  # of Markdown and of HTML
_METADATA = {  # kinds of the card's entries that the Hub checks
    "license": (str, list),
    "license_name": (str,),
    "license_link": (str,),
    "library_name": (str,),
    "pipeline_tag": (str,),
    "base_model_relation": (str,),
    "language": (str, list),
    "tags": (list,),
    "metrics": (str, list),
    "datasets": (str, list),
    "base_model": (str, list),
}


class PublishError(ModelError):
    """A model that can't be published; the message says what is wrong, and how to try again."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Content of an upload to the Hub.

    Args:
        repo_id: Repository, "org/name".
        folder: Folder that the files are copied from.
        files: Size of each file in bytes, by name.
        left_out: Other files of the folder, which are not uploaded.
        metadata: Metadata of the card, as the Hub reads it.
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

    The card is rewritten for ``repo_id``, unless it was edited by hand. Files of an earlier version that this one lacks, such as
    its report, are removed; files that others have put there stay.

    Args:
        folder: Model folder that :func:`save_model`, ``RobustFineTuner.save`` or ``pretrain`` wrote.
        repo_id: "org/name", or a name in the user's own namespace; created if it doesn't exist.
        private: Whether a new repository is private; by default what the organisation has set, usually public. An existing one
            must already have this visibility.
        revision: Branch to push to; created if it doesn't exist.
        create_pr: Open a pull request to the main branch instead.
        commit_message: Message of the commit; "Upload" and the model's name by default.
        token: Token of the Hub; by default the stored one.

    Returns:
        The commit. If nothing differs, no new one is made: it is the last one, without a ``pr_url``.

    Raises:
        PublishError: If the folder isn't a complete model, the card's metadata is wrong, or the Hub refuses. No part of the
            model is on the Hub then, but a repository or branch created for it stays there, empty. The message holds the
            command that tries again.
    """
    folder = Path(folder)
    api = HfApi(token=token, library_name=LIBRARY, library_version=__version__)
    _check_target(repo_id, revision, create_pr)
    retry = shlex.join(
        ["cartl-hub", "publish", str(folder), "--to", repo_id]
        + ([] if private is None else ["--private" if private else "--public"])
        + (["--revision", revision] if revision else [])
        + (["--create-pr"] if create_pr else [])
        + (["--message", commit_message] if commit_message else [])
    )

    def find_id() -> str:
        with _kept(folder, repo_id, retry):
            return _full_id(repo_id, _user(api))

    with _prepared(folder, find_id) as (prepared, full_id):
        if shown := pictured(path.name for path in prepared.iterdir()):
            logger.warning("some of the test images are in %s, which is published", " and ".join(shown))
        with _kept(folder, full_id, retry):
            made = _make(api, full_id, private)
        left = f"The repository {full_id} was made and stays there, empty unless the commit arrived." if made else ""
        with _kept(folder, full_id, retry, left):
            if revision not in (None, "main"):
                retried(lambda: api.create_branch(full_id, branch=str(revision), exist_ok=True))

            def upload() -> CommitInfo:
                return api.upload_folder(
                    repo_id=full_id,
                    folder_path=prepared,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message or f"Upload {folder.resolve().name}",
                    delete_patterns=list(PUBLISHED),
                )

            # a commit whose reply was lost is found done by the second attempt; a second pull request would be one too many
            return upload() if create_pr else retried(upload)


def pictured(names: Iterable[str]) -> list[str]:
    """Those of some files that show test images."""
    present = set(names)
    return [name for name in ("samples.png", "report.html") if name in present]


def plan(folder: str | Path, repo_id: str, *, revision: str | None = None, create_pr: bool = False) -> Upload:
    """Plan of what :func:`publish` would upload with the same arguments; nothing is uploaded.

    Raises:
        PublishError: If the folder can't be published.
    """
    folder = Path(folder)
    _check_target(repo_id, revision, create_pr)
    with _prepared(folder, lambda: repo_id) as (prepared, _):
        files = {path.name: path.stat().st_size for path in sorted(prepared.iterdir())}
        metadata = ModelCard((prepared / CARD).read_text(encoding="utf-8")).data.to_dict()
    left_out = tuple(sorted(path.name for path in folder.iterdir() if path.name not in files))
    return Upload(repo_id=repo_id, folder=folder, files=files, left_out=left_out, metadata=metadata)


def check_publishable(repo_id: str, card: str, *, private: bool | None = None, token: str | bool | None = None) -> str:
    """Check that a model could be published: id, card, token, and the right to write; nothing is created or changed.

    Args:
        repo_id: "org/name", or a name in the user's own namespace.
        card: Text of the model's README.md.
        private: Visibility, as for :func:`publish`.
        token: Token of the Hub; by default the stored one.

    Returns:
        The full id, "org/name".

    Raises:
        PublishError: If the model could not be published.
    """
    _check_target(repo_id)
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
        _check_visibility(_find(api, repo_id), private)
    return repo_id


def _make(api: HfApi, repo_id: str, private: bool | None) -> bool:
    """Create the repository unless it exists; return whether it was created."""
    found = _find(api, repo_id)
    _check_visibility(found, private)
    if found is None:
        retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    return found is None


def _find(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return retried(lambda: api.model_info(repo_id))
    except RepositoryNotFoundError:
        return None


def _check_visibility(found: ModelInfo | None, private: bool | None) -> None:
    if found is None or private is None or found.private == private:
        return
    wanted, got = ("private", "public") if private else ("public", "private")
    raise PublishError(
        f"expected {found.id} to be {wanted}, got a repository that exists and is {got}; change that in its settings on the Hub, "
        f"or publish without asking for a {wanted} one."
    )


def _user(api: HfApi) -> dict[str, Any]:
    """User that the token belongs to."""
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


def _check_target(repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise PublishError(f"expected a Hub id 'org/name': {error}") from error
    if create_pr and revision not in (None, "main"):
        raise PublishError(
            f"expected a branch or a pull request, got create_pr with the revision {revision!r}; leave one out, as the Hub opens "
            "pull requests to main."
        )


def _check_card(text: str) -> None:
    """Refuse what the Hub's own validation would refuse, as far as that can be known offline."""
    try:
        ModelCard(text)  # reads the results in the metadata too
        head = REGEX_YAML_BLOCK.search(text)
        data = (yaml.safe_load(head.group(2)) if head else None) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise PublishError(f"expected metadata in YAML at the head of {CARD}: {error}") from error
    for key, kinds in _METADATA.items():
        value = data.get(key)
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not isinstance(value, kinds) or not all(isinstance(item, str) for item in values):
            names = " or ".join({str: "string", list: "list of strings"}[kind] for kind in kinds)
            raise PublishError(f"expected a {names} for {key!r} in {CARD}, got {value!r}.")
        for item in values:
            if key in ("datasets", "base_model") and not is_repo_id(item):
                raise PublishError(f"expected ids of the Hub for {key!r} in {CARD}, got {item!r}; leave it out.")
            if key == "license" and item not in LICENSES:
                raise PublishError(
                    f"expected a license that the Hub knows, e.g. mit, for 'license' in {CARD}, got {item!r}; write other, and "
                    "its name as license_name."
                )


@contextmanager
def _prepared(folder: Path, find_id: Callable[[], str]) -> Iterator[tuple[Path, str]]:
    """A temporary copy of what is published, complete and checked, and the id that its card names.

    Args:
        folder: Folder of the model.
        find_id: Function that finds the id; called once all else has been checked.
    """
    try:
        model = read_model(folder)
        report = read_report(folder)
    except ValueError as error:
        raise PublishError(f"{folder} can't be published: {error}") from error
    if report is not None and not report.is_of(sha256(folder / WEIGHTS)):
        raise PublishError(f"expected a report of the weights in {folder}, got one of others; evaluate them again.")
    card = _read_card(folder / CARD)
    loaded = _LOADED_ID.search(card or "")
    generated = card is None or (loaded and card == render_card(model, report=report, repo_id=loaded[1]))
    if card is None:
        card = render_card(model, report=report)
    _check_card(card)
    with tempfile.TemporaryDirectory(prefix="cartl_hub-") as temporary:
        target = Path(temporary)
        for path in _sent(folder, card):
            if path.is_symlink() or not path.is_file():
                raise PublishError(f"expected files in {folder}, got {path.name}, which is a link or a folder; put a copy there.")
            _copy(path, target / path.name)
        if (recipe := target / RECIPE).exists():
            write_file(recipe, _without_paths(recipe))
        write_file(target / CARD, card)
        for path in target.iterdir():
            if path.name != WEIGHTS and _TOKEN.search(path.read_bytes()):
                raise PublishError(f"{folder / path.name} holds what looks like a token of the Hub; remove it.")
        repo_id = find_id()
        if generated:
            write_file(target / CARD, render_card(model, report=report, repo_id=repo_id))
        yield target, repo_id


def _without_paths(path: Path) -> str:
    """A recipe without the local copy of its data, which is a path on somebody's machine."""
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise PublishError(f"{RECIPE} can't be published: {error}") from error
    text = path.read_text(encoding="utf-8")
    data = content.get("data") if isinstance(content, dict) else None
    if not isinstance(data, dict) or data.pop("local", None) is None:
        return text
    shorter = re.sub(r"^\s+local:.*\n", "", text, flags=re.MULTILINE)  # keeps comments
    with suppress(yaml.YAMLError):  # a value of several lines
        if yaml.safe_load(shorter) == content:
            return shorter
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _read_card(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        return path.read_bytes().decode("utf-8-sig")  # the Hub finds no metadata behind a byte order mark
    except UnicodeDecodeError as error:
        raise PublishError(
            f"expected UTF-8 in {path}: {error}; save it as UTF-8, or remove it to have it written anew."
        ) from error


def _sent(folder: Path, card: str) -> list[Path]:
    """Files that belong to the model: those that this library writes, and pictures that the card shows.

    Raises:
        PublishError: If the card shows a picture that isn't there.
    """
    links = {unquote(link) for link in _LINK.findall(card)}
    shown = {link for link in links if Path(link).suffix.lower() in PICTURES and "://" not in link}
    if missing := sorted(link for link in shown if link.startswith(".") or "/" in link or not (folder / link).exists()):
        raise PublishError(
            f"expected the pictures that {CARD} shows beside it in {folder}, not hidden, got none for "
            f"{', '.join(missing)}; put them there, or write the card again: cartl-hub card {folder}"
        )
    return [path for path in sorted(folder.iterdir()) if path.name in {*PUBLISHED, *shown}]


def _copy(source: Path, target: Path) -> None:
    """The same file under another name where the disk allows it, as weights can be large; it is only read."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _kept(folder: Path | None, repo_id: str, retry: str | None, left: str = "") -> Iterator[None]:
    """Errors of the Hub's client, with what stays on the Hub, where the model is and how to continue."""
    try:
        with explained(f"the model {repo_id!r}", act="published on the Hub"):
            yield
    except ValueError as error:
        said = (
            str(error).strip() if isinstance(error, ModelError) else f"the model {repo_id!r} can't be published: {error}".strip()
        )
        parts = [said if said.endswith((".", "!", "?")) else f"{said}."]
        if retry is not None:
            parts += [left, f"Nothing was lost: the model is in {folder}. To try again: {retry}"]
        raise PublishError(" ".join(filter(None, parts))) from error
