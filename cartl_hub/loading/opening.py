"""Sources of data sets: memory, a folder, or the Hub."""

import glob
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict, Image, IterableDataset, IterableDatasetDict
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder as PictureFolder
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..data import DataError, as_stored, listed
from ..images import ImagePolicy, policy_to_dict
from .arguments import ROLES, DataArguments, Notes
from .columns import undecoded
from .confinement import Confinement, hub_confinement

logger = logging.getLogger(__name__)

_FILES = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
_LOADERS = ("arrow", "csv", "generator", "json", "parquet", "webdataset")  # of datasets, whose name says nothing of the data
# where the cache of datasets keeps what came from the Hub: owner___name/configuration/version/commit/
_CACHED = re.compile(r"/(?P<id>[^/]+)/[^/]+/[^/]+/(?P<revision>[0-9a-f]{40})/[^/]+$")

AnyData: TypeAlias = str | Path | Dataset | DatasetDict | IterableDataset | IterableDatasetDict | Mapping[str, Any]


@dataclass
class OpenedData:
    """An open data set.

    Args:
        splits: Splits by name, each a ``Dataset`` or an ``IterableDataset``.
        origin: Id, configuration and revision, as cards and reports state them.
        location: Location of a local data set; cards and reports don't show it.
        confinement: Confinement of the pictures that rows name by a path.
    """

    splits: dict[str, Any]
    origin: dict[str, Any]
    location: str = ""
    confinement: Callable[[Any], Any] = as_stored


def open_data(data: AnyData, arguments: DataArguments, notes: Notes) -> OpenedData:
    """Open a data set; its pictures are not read yet.

    Raises:
        DataError: If there is no such data set.
    """
    opened = _open(data, arguments, notes)
    if arguments.id is not None:
        opened.origin["id"] = arguments.id
    return opened


def describe(origin: Mapping[str, Any], split: str, policy: ImagePolicy) -> dict[str, Any]:
    """Description of the images of a split for reports and lineages; JSON."""
    return {**origin, "split": split, "image_policy": policy_to_dict(policy)}


def _open(data: AnyData, arguments: DataArguments, notes: Notes) -> OpenedData:
    if isinstance(data, (Dataset, IterableDataset)):
        data = {"train": data}
    if isinstance(data, Mapping):
        if not data:
            raise DataError("expected at least one split, got an empty mapping.")
        return OpenedData(dict(data), origin_of(next(iter(data.values()))))
    if not isinstance(data, (str, Path)):
        raise DataError(
            f"expected a datasets.Dataset, a DatasetDict, a Hub id or a folder, got {type(data).__name__}; "
            "datasets.Dataset.from_dict makes one from arrays."
        )
    if not str(data).strip():
        raise DataError(f"expected a folder, a parquet file or a Hub id, got {str(data)!r}.")
    path = Path(data).expanduser()
    if path.exists():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            splits, confinement = _saved(path, arguments.streaming), as_stored
        else:
            builder, files = _files(path, notes)
            splits = _load(str(data), builder, data_files=files, streaming=arguments.streaming)
            folder = path.resolve() if path.is_dir() else path.resolve().parent
            confinement = as_stored if builder == "imagefolder" else Confinement((folder,))
        return OpenedData(splits, {"id": path.resolve().name}, str(path.resolve()), confinement)
    if str(data).startswith((".", "/", "~")) or str(data).count("/") > 1:
        raise DataError(f"expected a folder, a parquet file or a Hub id, got {str(data)!r}, which does not exist.")
    revision = _commit(str(data), arguments.revision)
    splits = _load(str(data), str(data), name=arguments.config, revision=revision, streaming=arguments.streaming)
    origin = {"id": str(data), "config": arguments.config, "revision": revision}
    return OpenedData(splits, origin, confinement=hub_confinement())


def _load(described: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    try:
        return dict(datasets.load_dataset(*args, **kwargs))
    except Exception as error:  # the loaders of datasets raise many kinds
        here = "" if Path(described).exists() else f" (there is no file or folder {described!r} here)"
        raise DataError(f"the data set {described!r} can't be read{here}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Message of ``datasets``, with that of the cause."""
    if "corresponds to no data" in str(error):
        return "it holds no pictures"
    reason = f"{type(error).__name__}: {error}"
    return f"{reason} ({_reason(error.__cause__)})" if error.__cause__ is not None else reason


def _saved(path: Path, streaming: bool) -> dict[str, Any]:
    """Splits that ``save_to_disk`` wrote."""
    try:
        saved: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # of a folder that lacks files, or holds others
        raise DataError(f"expected what save_to_disk wrote in {path}: {_reason(error)}; save it again.") from error
    splits = dict(saved) if isinstance(saved, Mapping) else {"train": saved}
    return {name: split.to_iterable_dataset() for name, split in splits.items()} if streaming else splits


def _files(path: Path, notes: Notes) -> tuple[str, dict[str, Any]]:
    """Loader of ``datasets`` for a local path, and the files of each split.

    By itself, ``datasets`` takes a "train" or "test" anywhere in a path for a split and leaves the other files out: of the
    classes "boat" and "bullet train" it would read only the second one.
    """
    if path.is_file():
        if path.suffix not in _FILES:
            remedy = (
                " Beside the pictures, as metadata.csv with a column file_name, it names the labels of a folder."
                if path.suffix == ".csv"
                else ""
            )
            raise DataError(f"expected a folder or a file of one of the kinds {', '.join(_FILES)}, got {path}.{remedy}")
        return _FILES[path.suffix], {"train": str(path)}
    files: dict[str, Any] = {}
    for file in sorted(path.rglob("*.parquet")):
        words = re.split("[^a-z]+", file.relative_to(path).with_suffix("").as_posix().lower())
        split = next((split for split, names in ROLES.items() if set(names).intersection(words)), "train")
        files.setdefault(split, []).append(str(file))
    if files:
        return "parquet", files
    if any(path.rglob("*.arrow")):
        raise DataError(
            f"expected pictures, parquet files or what save_to_disk wrote in {path}, got arrow files without its "
            "state.json or dataset_dict.json; save the data again, or name one file."
        )
    folders = [folder.name for folder in sorted(path.iterdir()) if folder.is_dir() and not folder.name.startswith(".")]
    named = [name for name in folders if any(name.lower() in names for names in ROLES.values())]
    unused = [name for name in folders if name not in named]
    if named and unused:
        notes.add(f"folders that are not used, as there is {', '.join(named)}: {listed(unused)}")
    parts = {name.lower(): path / name for name in named} or {"train": path}
    return "imagefolder", {name: _pictures(part, notes) for name, part in parts.items()}


def _pictures(folder: Path, notes: Notes) -> str:
    """Pattern of the pictures of a split: with a picture beside folders of classes, ``datasets`` would not take the folders for
    classes."""
    inside = [item for item in folder.iterdir() if not item.name.startswith(".")]
    loose = [item.name for item in inside if item.suffix.lower() in PictureFolder.EXTENSIONS and item.is_file()]
    classes = any(item.is_dir() for item in inside)
    if not loose or not classes or any(item.stem == "metadata" for item in inside):
        return f"{glob.escape(str(folder))}/**"
    notes.add(f"pictures that are not used, as they lie beside the folders of the classes in {folder.name}: {listed(loose)}")
    return f"{glob.escape(str(folder))}/*/**"


def _commit(hub_id: str, revision: str | None) -> str | None:
    """The current commit of a branch, so that the commit read is the one reported."""
    try:
        return huggingface_hub.HfApi().dataset_info(hub_id, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled):  # what the loader makes of it is said
        return revision
    except Exception:  # without a network the loader tries for half a minute
        logger.warning(
            "the Hub can't be reached for the data set %r, which is no file or folder here; is it in the cache?", hub_id
        )
        return revision


def origin_of(split: Any) -> dict[str, Any]:
    """Id of the data that a split was made from, and its revision if that is known."""
    for file in getattr(split, "cache_files", ()):
        if match := _CACHED.search(Path(file["filename"]).as_posix()):
            return {"id": match["id"].replace("___", "/"), "revision": match["revision"]}
    info = getattr(split, "info", None)
    name = getattr(info, "dataset_name", None) or getattr(info, "builder_name", None)
    if name == "imagefolder" and isinstance(split, Dataset):
        return {"id": _folder_name(split)}
    return {"id": "data in memory" if name in (None, *_LOADERS) else name}


def _folder_name(split: Dataset) -> str:
    """Name of the folder of class folders, which ``load_dataset("imagefolder", data_dir=...)`` doesn't keep."""
    column = next((name for name, feature in split.features.items() if isinstance(feature, Image)), None)
    if column is None or not len(split):
        return "imagefolder"
    rows = range(0, len(split), max(1, len(split) // 32))  # files are in order, so that these lie in more than one class
    pictures = undecoded(split.select(rows), column)[:][column]
    paths = [Path(picture["path"]) for picture in pictures if picture and picture.get("path")]
    if not paths or not all(path.is_absolute() for path in paths):
        return "imagefolder"
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    splits = {name for names in ROLES.values() for name in names}
    return (folder.parent if folder.name.lower() in splits else folder).name or "imagefolder"
