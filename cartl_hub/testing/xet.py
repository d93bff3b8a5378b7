"""Files that come through xet, the client's default, without a xet server.

For a token whose server is ``local://<folder>``, ``hf_xet`` itself keeps its chunks in that folder. The folder is not documented:
client and server must share a file system, and no two processes may write the same repository at once.
"""

import shutil
import struct
import tempfile
from pathlib import Path

_RECORD = 48  # bytes, of everything in a shard
_END = b"\xff" * 32


def token(folder: Path) -> dict[str, str | int]:
    """Token with which the client can write to the folder and read from it."""
    folder.mkdir(parents=True, exist_ok=True)
    return {"casUrl": f"local://{folder}", "accessToken": "xet", "exp": 1 << 40}


def uploaded(folder: Path) -> dict[str, str]:
    """The xet hash of each file in the folder, by sha256."""
    found: dict[str, str] = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        found |= _shard_files(shard.read_bytes())
    return found


def content(folder: Path, xet_hash: str) -> bytes:
    """The bytes of a file."""
    import hf_xet

    with tempfile.TemporaryDirectory() as copy:  # of the folder, whose index another process may have locked
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        target = Path(copy, "content")
        with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, None), str(target))
        return target.read_bytes()


def _shard_files(shard: bytes) -> dict[str, str]:
    """Xet hash by sha256 of the files in a shard.

    After a header of one record, each file has: its hash, flags and number of segments; the segments; if bit 31 is set, as many
    records to verify them; if bit 30 is set, its sha256.
    """
    files: dict[str, str] = {}
    start = _RECORD
    while (header := shard[start : start + _RECORD])[:32] != _END:
        flags, segments = struct.unpack("<II", header[32:40])
        start += _RECORD * (1 + segments * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            files[_hexadecimal(shard[start : start + 32])] = _hexadecimal(header[:32])
            start += _RECORD
    return files


def _hexadecimal(digest: bytes) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", digest))
