"""Files that are replaced as a whole."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, whenever this process dies."""
    write_files({path: content})


def write_files(contents: Mapping[Path, bytes | str]) -> None:
    """Write files that belong together: all of them are on the disk before the first one is replaced."""
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


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
