"""Files that are replaced as a whole."""

import glob
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

STALE = 3600.0  # seconds after which nobody is still writing a file


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, whenever this process dies."""
    _replace({path: content})


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: all of them are on the disk before the first one is replaced."""
    remove_stale(contents)  # not for each of many single files: it lists the folder
    _replace(contents)


def _replace(contents: Mapping[Path, bytes | str]) -> None:
    partial = {path: path.with_name(f"{path.name}.{os.getpid()}.partial") for path in contents}  # other processes have others
    try:
        for path, content in contents.items():
            with open(partial[path], "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in partial.items():
        os.replace(temporary, path)


def remove_stale(paths: Iterable[Path]) -> None:
    """What a process left that was killed while it wrote these files."""
    for path in paths:
        for other in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
            with suppress(OSError):
                if time.time() - other.stat().st_mtime > STALE:
                    other.unlink()


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
