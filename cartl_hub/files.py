"""Files that are replaced as a whole."""

import hashlib
import os
from pathlib import Path


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, whenever this process dies."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
