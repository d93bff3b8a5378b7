"""State of a repository on a Hub: commits, references and discussions, without HTTP."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from .errors import HubError
from .tree import GITATTRIBUTES, File, check_path, files_hash, make_file, under

Gated = Literal["auto", "manual", False]

MAIN = "refs/heads/main"


@dataclass(frozen=True)
class Commit:
    """One commit.

    Args:
        oid: Hash of the commit, 40 hexadecimal digits.
        parent: Oid of the previous commit.
        title: First line of the message.
        description: Rest of the message.
        author: Name of a user.
        date: Date in UTC.
        files: All files by path, not only the changed ones.
    """

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: datetime
    files: Mapping[str, File] = field(repr=False)


@dataclass
class Discussion:
    """A discussion, or a pull request with the reference ``refs/pr/<num>``.

    Args:
        base: Oid of the commit that a pull request started from; None for a discussion.
        events: Events as the Hub shows them, the oldest first.
        merge_commit: Oid of the commit that merged it.
    """

    num: int
    title: str
    author: str
    status: Literal["draft", "open", "closed", "merged"]
    base: str | None
    date: datetime
    events: list[dict[str, Any]] = field(default_factory=list)
    merge_commit: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def record(self, kind: str, author: str, **data: Any) -> dict[str, Any]:
        """Add an event and return it."""
        event = {
            "id": f"{self.num}-{len(self.events)}",
            "type": kind,
            "createdAt": timestamp(datetime.now(UTC)),
            "author": {"name": author},
            "data": data,
        }
        self.events.append(event)
        return event

    def comment(self, author: str, text: str) -> dict[str, Any]:
        return self.record("comment", author, edited=False, hidden=False, latest={"raw": text})


class Repository:
    """A model, data set or space. Like the Hub's, it starts with a commit of ``.gitattributes``.

    Args:
        repo_id: Id of the repository, ``namespace/name``.
        repo_type: Type of the repository: ``model``, ``dataset`` or ``space``.
        private: Whether only its owners see it.
        gated: Whether only its owners and the users in ``granted`` get its files.
        author: Author of the first commit.
    """

    def __init__(self, repo_id: str, repo_type: str, *, private: bool = False, gated: Gated = False, author: str = "hub") -> None:
        self.id, self.type, self.private, self.gated = repo_id, repo_type, private, gated
        self.granted: set[str] = set()
        self.created = datetime.now(UTC)
        self.downloads = self.likes = 0
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.lfs_objects: dict[str, bytes] = {}  # by sha256; also what was uploaded and not committed yet
        self.xet_hashes: dict[str, str] = {}  # of the LFS objects that came through xet, by sha256
        self.discussions: list[Discussion] = []
        self.commit(MAIN, {".gitattributes": make_file(GITATTRIBUTES)}, "initial commit", author)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    # Revisions

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag, a full reference, an oid or its first digits (7 or more).

        Raises:
            HubError: With 404 ``RevisionNotFound``.
        """
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            for oid, commit in self.commits.items():
                if oid.startswith(revision):
                    return commit
        raise _no_revision(revision)

    def writable_ref(self, revision: str) -> str:
        """The reference that a commit to ``revision`` moves.

        Raises:
            HubError: With 404 ``RevisionNotFound`` if it is neither a branch nor a pull request.
        """
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise _no_revision(revision)

    def add_ref(self, ref: str, revision: str) -> None:
        """Create a branch or a tag.

        Raises:
            HubError: With 409 if it exists.
        """
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.resolve(revision).oid

    def remove_ref(self, ref: str) -> None:
        if ref == MAIN:
            raise HubError(403, "The default branch can't be deleted")
        if self.refs.pop(ref, None) is None:
            raise _no_revision(ref)

    # Commits

    def commit(self, ref: str, files: Mapping[str, File], title: str, author: str, description: str = "") -> Commit:
        """Put a commit that holds ``files``, and no others, on ``ref``."""
        parent, date = self.refs.get(ref), datetime.now(UTC)
        oid = files_hash(files, self.id, parent or "", title, str(len(self.commits)), timestamp(date))
        self.lfs_objects |= {file.sha256: file.content for file in files.values() if file.lfs}
        self.commits[oid] = Commit(oid, parent, title, description, author, date, dict(files))
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """History of ``commit``, itself included, the newest first."""
        oid: str | None = commit.oid
        while oid:
            yield self.commits[oid]
            oid = self.commits[oid].parent

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The last commit up to ``commit`` that changed a file or a folder."""
        last, held = commit, under(commit.files, path)
        for earlier in self.history(commit):
            if under(earlier.files, path) != held:
                break
            last = earlier
        return last

    # Discussions and pull requests

    def open_discussion(self, title: str, author: str, text: str, *, base: str | None = None, draft: bool = False) -> Discussion:
        """Open a discussion; or with ``base``, an oid, a pull request that starts from it."""
        num = len(self.discussions) + 1
        discussion = Discussion(num, title, author, "draft" if draft else "open", base, datetime.now(UTC))
        discussion.comment(author, text)
        self.discussions.append(discussion)
        if base:
            self.refs[discussion.ref] = base
        return discussion

    def discussion(self, num: int) -> Discussion:
        if not 1 <= num <= len(self.discussions):
            raise HubError(404, f"Discussion not found: {num}")
        return self.discussions[num - 1]

    def conflicts(self, discussion: Discussion) -> list[str]:
        """Paths that main changed in another way than the pull request did."""
        base, main, proposed = self._sides(discussion)
        changed = [path for path in base.keys() | proposed.keys() if base.get(path) != proposed.get(path)]
        return sorted(path for path in changed if main.get(path) not in (base.get(path), proposed.get(path)))

    def merge(self, discussion: Discussion, author: str) -> Commit:
        """Put what a pull request changed on main.

        Raises:
            HubError: With 400 for one that is not open, 409 on conflicts.
        """
        if discussion.base is None or discussion.status != "open":
            raise HubError(400, f"Expected an open pull request, got {discussion.num}, which is {discussion.status}")
        if conflicts := self.conflicts(discussion):
            raise HubError(409, f"Merge conflicts in {', '.join(conflicts)}")
        base, main, proposed = self._sides(discussion)
        kept = {path: file for path, file in main.items() if path in proposed or path not in base}
        added = {path: file for path, file in proposed.items() if base.get(path) != file}
        commit = self.commit(MAIN, kept | added, f"{discussion.title} (#{discussion.num})", author)
        discussion.status, discussion.merge_commit = "merged", commit.oid
        discussion.record("status-change", author, status="merged")
        return commit

    def _sides(self, discussion: Discussion) -> tuple[Mapping[str, File], ...]:
        assert discussion.base is not None
        return tuple(self.commits[oid].files for oid in (discussion.base, self.refs[MAIN], self.refs[discussion.ref]))


def apply(
    repository: Repository, files: Mapping[str, File], operations: Iterable[tuple[str, Mapping[str, Any]]]
) -> dict[str, File]:
    """The files after the operations of a commit.

    Args:
        repository: Repository that holds the LFS objects.
        files: Files before the commit.
        operations: Pairs of ``file`` (with a ``content`` in bytes), ``lfsFile``, ``deletedFile`` or ``deletedFolder``, and
            their values.

    Raises:
        HubError: With 400 on bad paths, unknown operations and LFS objects that were not uploaded; 404 ``EntryNotFound`` on
            deletions of missing entries.
    """
    changed = dict(files)
    for kind, value in operations:
        path = value["path"].rstrip("/") if kind == "deletedFolder" else value["path"]
        check_path(path)
        match kind:
            case "file":
                changed[path] = make_file(value["content"])
            case "lfsFile":
                changed[path] = _lfs_file(repository, value["oid"])
            case "deletedFile" | "deletedFolder":
                gone = under(changed, path)
                if not gone or (path in gone) != (kind == "deletedFile"):
                    word = "file" if kind == "deletedFile" else "folder"
                    raise HubError(404, f"A {word} with this name doesn't exist: {path}", "EntryNotFound")
                changed = {name: file for name, file in changed.items() if name not in gone}
            case _:
                raise HubError(400, f"Unknown operation: {kind}")
    for path in changed:
        for folder in _folders(path):
            if folder in changed:
                raise HubError(400, f"Invalid path: {path!r} lies in {folder!r}, which is a file")
    return changed


def _lfs_file(repository: Repository, sha256: str) -> File:
    if sha256 not in repository.lfs_objects:
        raise HubError(400, f"An LFS pointer pointed to a file that does not exist: {sha256}")
    return make_file(repository.lfs_objects[sha256], lfs=True, xet_hash=repository.xet_hashes.get(sha256))


def _folders(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _no_revision(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def timestamp(date: datetime) -> str:
    """A date as the Hub writes it: 2024-01-31T12:00:00.000Z."""
    return date.isoformat(timespec="milliseconds").replace("+00:00", "Z")
