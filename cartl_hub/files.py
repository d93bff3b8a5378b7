"""Files that are replaced as a whole, and folders that one run at a time works in."""

import glob
import hashlib
import logging
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

STALE = 3600.0  # seconds after which nobody is still writing a file


class BusyError(RuntimeError):
    """Another run works in a folder."""


_held: set[Path] = set()  # by this process, whose own locks don't keep it out


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file for this run; the lock ends with the block or with the process, however it dies.

    Raises:
        BusyError: If another run holds it.
    """
    own = path.resolve()
    if own in _held:  # before the file is opened: closing it again would end this process's lock
        raise BusyError(_busy(path, "another thread of this process"))
    with open(path, "a+") as file:
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a decoding worker would keep it for a dead run
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                raise BusyError(_busy(path, f"process {file.read().strip() or 'unknown'}")) from error
            except OSError as error:  # a file system without locks
                logger.warning("%s can't be locked (%s): take care that one run at a time uses the folder", path, error)
        _held.add(own)
        try:
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            yield
        finally:
            _held.discard(own)


def _busy(path: Path, who: str) -> str:
    return f"expected no other run in {path.parent}, got {who}, which works there. Wait for it, end it, or use another folder."


def write_file(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, whenever this process dies.

    Args:
        durable: Whether the file must also survive a crash of the machine, which means waiting for the disk.
    """
    _replace({path: content}, durable)


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: all of them are on the disk before the first one is replaced."""
    remove_stale(contents)  # not for each of many single files: it lists the folder
    _replace(contents)


def _replace(contents: Mapping[Path, bytes | str], durable: bool = True) -> None:
    partial = {path: path.with_name(f"{path.name}.{os.getpid()}.partial") for path in contents}  # other processes have others
    try:
        for path, content in contents.items():
            with _named(path), open(partial[path], "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
    except BaseException:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in partial.items():
        os.replace(temporary, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in a disk error if Python names none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove leftovers of a process that was killed while it wrote these files."""
    for path in paths:
        for other in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > STALE:
                    other.unlink()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
