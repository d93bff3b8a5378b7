"""A Hub on this machine, for as long as a ``with`` block lasts."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import TracebackType

from .access import User
from .client import client_environment, connected
from .faults import Fault, Faults, Injection
from .repository import Commit, Gated, Repository
from .routes import answer
from .server import Reply, Request, Seen, Server
from .tree import check_path, is_lfs, make_file


class LocalHub:
    """A Hub on 127.0.0.1 that the real ``huggingface_hub`` client can use, while in a ``with`` block.

    Its content is kept in memory and outlives the block: entered again, the hub has the same address and the same repositories.

    Args:
        port: Port to listen on; 0 takes a free one.
        tokens: Users by token, beside :attr:`write_token` (user ``writer``, who also owns the namespace ``org``) and
            :attr:`read_token` (user ``reader``, who owns nothing).
        xet: Whether large files go through xet, as they do by default on the real Hub. It needs ``hf_xet``, and the client on
            this machine; without it, clients must have xet off.
        page_size: Number of list entries in one reply.

    Attributes:
        repositories: Repositories by type (``model``, ``dataset``, ``space``) and id.
        requests: Requests that came in, in the order of the replies.
    """

    write_token = "hf_writer"
    read_token = "hf_reader"

    def __init__(
        self, *, port: int = 0, tokens: Mapping[str, User] | None = None, xet: bool = False, page_size: int = 1000
    ) -> None:
        ready = {self.write_token: User("writer", organizations=("org",)), self.read_token: User("reader", "read")}
        self.tokens: dict[str, User] = {**ready, **(tokens or {})}
        self.port, self.xet, self.page_size = port, xet, page_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[Seen] = []
        self.expected_uploads: set[str] = set()
        self._errors: list[Exception] = []
        self._faults = Faults()
        self._lock = Lock()  # so that a commit is seen whole or not at all
        self._server: Server | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="local-hub-")) if xet else None
        if self._folder:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __enter__(self) -> "LocalHub":
        self._start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop()
        errors, self._errors = self._errors, []
        if errors and error is None:
            raise ExceptionGroup("LocalHub failed to answer", errors)
        if errors and error is not None:
            error.add_note(f"LocalHub failed to answer: {errors!r}")

    def _start(self) -> None:
        self._server = Server(self.port, self._answer, self._faults, self.requests, self._errors)
        self.port = self._server.server_address[1]

    def _stop(self) -> None:
        if self._server is not None:
            self._server.stop()
        self._server = None

    def _answer(self, request: Request) -> Reply:
        with self._lock:
            return answer(self, request)

    # For clients

    @property
    def endpoint(self) -> str:
        """Address that clients use in place of https://huggingface.co."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def content_endpoint(self) -> str:
        """Address of LFS files: the same server, which is another origin for clients."""
        return f"http://localhost:{self.port}"

    def url(self, repo_id: str, repo_type: str = "model") -> str:
        """Address of the page that a repository would have."""
        return f"{self.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"

    def environment(self, cache: str | Path, *, token: str | None = None, xet: bool = False) -> dict[str, str]:
        """Variables that make another process use this hub, to be added to ``os.environ``.

        Args:
            cache: Folder for everything that the client keeps.
            token: Token that the client sends; none by default.
            xet: Whether the client uses xet.
        """
        return client_environment(self.endpoint, Path(cache), token, xet)

    def client(
        self, *, token: str | None = None, cache: str | Path | None = None, xet: bool = False, backoff: bool = True
    ) -> AbstractContextManager[Path]:
        """Make ``huggingface_hub`` and ``datasets`` in this process use this hub inside a ``with`` block.

        Args:
            token: Token that the client sends; none by default.
            cache: Folder for everything that the client keeps; by default a temporary one. The block gets it.
            xet: Whether the client uses xet.
            backoff: Whether the client waits before it tries again. False makes tests of faults fast.
        """
        return connected(lambda folder: self.environment(folder, token=token, xet=xet), cache, backoff)

    # For tests

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str] | None = None,
        *,
        repo_type: str = "model",
        private: bool = False,
        gated: Gated = False,
        checked: bool = True,
    ) -> Repository:
        """Create a repository and commit files to it, bypassing all rights.

        Args:
            repo_id: Id of the repository, ``namespace/name``.
            files: Files by path.
            repo_type: Type of the repository: ``model``, ``dataset`` or ``space``.
            private: Whether only its owners see it.
            gated: Whether its files need permission: ``add_repo(...).granted`` is the set of users who have it.
            checked: Whether to check paths. False allows paths that no Hub accepts, such as ``../evil``, to test loaders.
        """
        repository = Repository(repo_id, repo_type, private=private, gated=gated)
        if files:
            _commit(repository, "main", files, "Edit", checked)
        with self._lock:
            if (repo_type, repo_id) in self.repositories:
                raise ValueError(f"{repo_id} exists; edit() changes its files.")
            self.repositories[repo_type, repo_id] = repository
        return repository

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[repo_type, repo_id]

    def files(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> dict[str, bytes]:
        """Contents by path, without ``.gitattributes``."""
        files = self.repo(repo_id, repo_type).resolve(revision).files
        return {path: file.content for path, file in files.items() if path != ".gitattributes"}

    def commits(self, repo_id: str, revision: str = "main", *, repo_type: str = "model") -> list[Commit]:
        """Commits, the newest first; the last one is the Hub's own."""
        repository = self.repo(repo_id, repo_type)
        return list(repository.history(repository.resolve(revision)))

    def edit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | str | None],
        *,
        revision: str = "main",
        repo_type: str = "model",
        title: str = "Edit",
        checked: bool = True,
    ) -> Commit:
        """Commit to a branch, bypassing all rights.

        Args:
            files: Contents by path; None deletes a file.
            checked: Whether to check paths. False allows paths that no Hub accepts.
        """
        with self._lock:
            return _commit(self.repo(repo_id, repo_type), revision, files, title, checked)

    def corrupt(self, repo_id: str, path: str, offset: int = -1, *, repo_type: str = "model") -> None:
        """Flip a bit of the file at the tip of main, wherever it is stored; its hashes stay as they were."""
        with self._lock:
            repository = self.repo(repo_id, repo_type)
            file = repository.resolve("main").files[path]
            content = bytearray(file.content)
            content[offset] ^= 1
            rotten = replace(file, content=bytes(content))
            for oid, commit in repository.commits.items():
                if commit.files.get(path) == file:
                    repository.commits[oid] = replace(commit, files={**commit.files, path: rotten})

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[Injection]:
        """Apply a fault inside the block; the block gets the count of requests that it hit."""
        with self._faults.injected(fault) as injection:
            yield injection

    @contextmanager
    def down(self) -> Iterator[None]:
        """Make the hub unreachable inside the block; afterwards it is back at the same address, with all its content."""
        self._stop()
        try:
            yield
        finally:
            self._start()

    def xet_folder(self, repository: Repository) -> Path:
        """Folder in which xet keeps the chunks of a repository: one folder each, since it locks them."""
        assert self._folder is not None
        return self._folder / f"{repository.type}s" / repository.id


def _commit(repository: Repository, revision: str, files: Mapping[str, bytes | str | None], title: str, checked: bool) -> Commit:
    ref = repository.writable_ref(revision)
    held = dict(repository.resolve(ref).files)
    for path, content in files.items():
        if checked:
            check_path(path)
        if content is None:
            del held[path]
            continue
        raw = content.encode() if isinstance(content, str) else content
        held[path] = make_file(raw, lfs=is_lfs(path, len(raw), raw[:512], held))
    return repository.commit(ref, held, title, "hub")
