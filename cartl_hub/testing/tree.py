"""Files of a commit, and the paths that they may have."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

from .errors import HubError

LARGE = 10_000_000  # bytes from which on a file is an LFS file whatever its name
_LFS_SUFFIXES = "7z arrow bin bz2 ckpt gz h5 msgpack npy npz onnx parquet pickle pkl pt pth safetensors tar tgz zip zst"
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in _LFS_SUFFIXES.split()).encode()


@dataclass(frozen=True)
class File:
    """A file of a commit, with the hashes that it was committed with.

    Args:
        content: Content that downloads get.
        sha256: SHA-256 of the content.
        oid: Git's hash of the content, or of the pointer of an LFS file.
        lfs: Whether git holds a pointer only.
        xet_hash: Xet hash of a file that came through xet.
    """

    content: bytes = field(repr=False)
    sha256: str
    oid: str
    lfs: bool = False
    xet_hash: str | None = None

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(_pointer(self.sha256, self.size))


def make_file(content: bytes, *, lfs: bool = False, xet_hash: str | None = None) -> File:
    """A file with the hashes of its content."""
    sha256 = hashlib.sha256(content).hexdigest()
    in_git = _pointer(sha256, len(content)) if lfs else content
    return File(content, sha256, sha1(b"blob %d\0" % len(in_git) + in_git), lfs, xet_hash)


def is_lfs(path: str, size: int, sample: bytes, files: Mapping[str, File]) -> bool:
    """Whether a new file becomes an LFS file: by ``.gitattributes``, by its size, or because it is binary.

    Args:
        path: Path in the repository.
        size: Size in bytes; empty files are never LFS files.
        sample: First bytes of the file.
        files: Files of the commit that it is added to.
    """
    attributes = files[".gitattributes"].content.decode(errors="replace") if ".gitattributes" in files else ""
    patterns = [line.split()[0] for line in attributes.splitlines() if "filter=lfs" in line.split()[1:]]
    named = any(fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern) for pattern in patterns)
    return size > 0 and (named or size > LARGE or b"\0" in sample)


def check_path(path: str) -> None:
    """Refuse anything but a plain relative path.

    Raises:
        HubError: With 400 if it is refused.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or part.lower() == ".git" for part in parts) or re.search(r"[\\\x00-\x1f]", path):
        raise HubError(400, f"Invalid path: expected a plain relative one such as folder/file.json, got {path!r}")


def under(files: Mapping[str, File], path: str) -> dict[str, File]:
    """The file at ``path``, or the files in that folder and its folders."""
    return {name: file for name, file in files.items() if not path or name == path or name.startswith(f"{path}/")}


def listing(files: Mapping[str, File], folder: str, *, recursive: bool) -> dict[str, File | None]:
    """Content of a folder: files by path, and None for folders.

    Raises:
        HubError: With 404 ``EntryNotFound`` for a missing folder.
    """
    prefix = f"{folder}/" if folder else ""
    found: dict[str, File | None] = {}
    for path in sorted(name for name in files if name.startswith(prefix)):
        parts = path.removeprefix(prefix).split("/")
        folders = [prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))]
        found |= dict.fromkeys(folders if recursive else folders[:1])
        if recursive or not folders:
            found[path] = files[path]
    if folder and not found:
        raise HubError(404, f"{folder} does not exist", "EntryNotFound")
    return found


def files_hash(files: Mapping[str, File], *more: str) -> str:
    """Hash of the files and of ``more``, 40 hexadecimal digits."""
    return sha1("\n".join([*more, *(f"{path} {file.oid}" for path, file in files.items())]).encode(errors="surrogatepass"))


def sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
