"""Files that the rows of a data set may name as pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub

_ARCHIVES = ("zip://", "tar://", "gzip://", "bz2://", "xz://", "zstd://", "lz4://")


@dataclass(frozen=True)
class Confinement:
    """Pictures as rows store them, of which those that a row names by a path must lie in given folders: rows that somebody else
    wrote must not make this machine open its other files, or connections.

    Args:
        folders: Folders, resolved; relative paths are taken from the first one.
        addresses: Beginnings of the addresses ("protocol://...") that are allowed.
    """

    folders: tuple[Path, ...]
    addresses: tuple[str, ...] = ()

    def __call__(self, picture: Any) -> Any:
        """The picture, with its path resolved.

        Raises:
            ValueError: If it lies elsewhere.
        """
        path = picture
        if isinstance(picture, Mapping) and picture.get("bytes") is None:
            path = picture.get("path")
        if not isinstance(path, str):
            return picture
        if "://" in path:
            *inner, outer = path.split("::")  # "zip://a.png::hf://..." is a file in an archive
            if outer.startswith(self.addresses) and all(hop.startswith(_ARCHIVES) for hop in inner):
                return path
        else:
            found = (self.folders[0] / path).resolve()
            if any(found.is_relative_to(folder) for folder in self.folders):
                return found
        raise ValueError(f"expected a picture inside {self.folders[0]}, got the path {path!r}.")


def hub_confinement() -> Confinement:
    """Confinement of data from the Hub: to the caches of ``datasets`` and ``huggingface_hub``, and to the Hub."""
    caches = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        datasets.config.EXTRACTED_DATASETS_PATH,
        huggingface_hub.constants.HF_HUB_CACHE,
    )
    folders = tuple(Path(cache).expanduser().resolve() for cache in caches)
    return Confinement(folders, ("hf://", f"{huggingface_hub.constants.ENDPOINT}/"))
