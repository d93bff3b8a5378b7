"""Reads a foreign file into a state dict, without running code in the file."""

import argparse
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

# What old training loops stored beside the weights, under the names of old and new NumPy: it holds values and runs nothing.
_SCALAR = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
    argparse.Namespace,
]


_DEEPEST = 3  # levels of dicts in which weights are looked for
_OTHER_FILES = (
    (b"", "an empty file", "download it again"),
    (b"<", "a web page", "download it again"),
    (b"version https://git-lfs", "a pointer of git-lfs", "fetch the file itself with `git lfs pull`"),
    (b"\x1f\x8b", "a gzip file", "unpack it"),
)


class CheckpointError(ValueError):
    """A checkpoint that can't be imported; the message says what was expected, what was found, and what to do."""


def read_file(path: Path) -> Any:
    """Content of a checkpoint: tensors and plain values.

    Files that the robustness library writes with ``dill`` need no ``dill`` to be read: like ``pickle`` it writes the name of what
    can be imported. A checkpoint that holds a function or a class of a script is refused, like any other that names code.

    Args:
        path: Safetensors file, or a file that ``torch.save`` wrote.

    Raises:
        CheckpointError: If it is something else, damaged, or names code; nothing of it was run then.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise CheckpointError(f"expected a checkpoint file, got {error.strerror or error}.") from error
    for beginning, kind, remedy in _OTHER_FILES:
        if start.lstrip().startswith(beginning) if beginning else not start:
            raise CheckpointError(f"expected a checkpoint, got {kind}; {remedy}.")
    if damaged := _damaged_record(path):
        raise CheckpointError(f"expected a whole checkpoint, got one whose record {damaged} is damaged; get it again.")
    try:
        if start[8:9] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        if names := re.findall(r"GLOBAL ([\w.]+)", str(error)) or _globals(path):
            raise CheckpointError(
                f"expected tensors and plain values, got a pickle that names {listed(dict.fromkeys(names))}, which may "
                "run code when it is read; nothing of it was run. Where you trust it, load it with the code that it needs, and "
                "save its state_dict() with torch.save or safetensors."
            ) from error
        if "Unsupported operand 149" in str(error):
            raise CheckpointError(
                "expected a file of torch.save with its usual pickle protocol, got one of protocol 4 or 5, which torch does not "
                "read without running code; where you trust it, load it and save its state_dict() again."
            ) from error
        reason = re.sub(r"(?s).*WeightsUnpickler error:\s*", "", str(error)).strip().partition("\n")[0]
        reason = reason.partition(" In PyTorch 2.6")[0].partition("Please file")[0]  # advice to run code
        raise CheckpointError(
            f"expected a whole checkpoint of torch.save or safetensors, got {type(error).__name__}: {reason}; if the file was "
            "cut off, get it again."
        ) from error


def _damaged_record(path: Path) -> str | None:
    """Name of the first record of a zip file whose checksum is wrong, which torch does not look at."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError):
        return None  # torch's reader says more


def _globals(path: Path) -> list[str]:
    """Imports of a plain pickle, found without running it: torch's reader stops at other things before it gets there."""
    names: list[str] = []
    strings: list[str] = []
    try:
        with open(path, "rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    names.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    except Exception:  # not a pickle, or one without its end
        return []
    return names


def find_weights(loaded: Any, entry: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in the content of a checkpoint, and the names of the other entries.

    Args:
        loaded: State dict, or a dict with one among its values.
        entry: Key of the state dict, if there are several.

    Raises:
        CheckpointError: If there is none, there are several, or it holds more than dense, plain weights.
    """
    if not isinstance(loaded, Mapping) or not loaded:
        got = f"an empty {type(loaded).__name__}" if isinstance(loaded, Mapping) else f"a {type(loaded).__name__}"
        raise CheckpointError(f"expected a state dict, or a dict that holds one, got {got}.")
    entries = _entries(loaded)
    inner = list(entries)
    outside = _most_dims(loaded) > 1
    if entry is not None and entry not in inner:
        raise CheckpointError(f"expected an entry {entry!r} with weights, got {listed(inner) or 'none with weights'}.")
    if entry is None and inner and len(inner) + outside > 1:
        more = " and weights outside of it" if outside else ""
        raise CheckpointError(f"expected one entry with weights, got {listed(inner)}{more}; choose one with entry= (--entry).")
    chosen = entry if entry is not None else inner[0] if inner else None
    state = loaded if chosen is None else entries[chosen]
    if odd := [f"{name} ({_kind(name, value)})" for name, value in state.items() if not _is_weight(name, value)]:
        raise CheckpointError(f"expected named dense tensors as weights, got among them {listed(odd)}.")
    if bound := [name for name in state if re.search(r"\.weight_orig$|\.parametrizations\.", name)]:
        raise CheckpointError(
            f"expected plain weights, got reparametrised ones ({listed(bound)}); save the network again when the "
            "reparametrisation is removed (of CARTL's two files take the one that ends in '-last')."
        )
    return dict(state), [] if chosen is None else [str(name) for name in loaded if name != chosen.partition(".")[0]]


def _entries(loaded: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Dicts with weights among the values; if there are none, those one level deeper, as "outer.inner"."""
    level = {str(name): value for name, value in loaded.items() if isinstance(value, Mapping)}
    for _ in range(_DEEPEST):
        if found := {name: value for name, value in level.items() if _most_dims(value) > 0}:
            return found
        inner = ((f"{name}.{key}", item) for name, value in level.items() for key, item in value.items())
        level = {name: item for name, item in inner if isinstance(item, Mapping)}
    return {}


def _kind(name: Any, value: Any) -> str:
    """Reason why an entry isn't a weight."""
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.device.type != "cpu":
        return f"Tensor on the {value.device.type} device"
    if value.layout is not torch.strided:
        return "sparse Tensor"
    return "quantised Tensor" if value.is_quantized else "Tensor of repeated numbers"


def _most_dims(values: Mapping[Any, Any]) -> int:
    """Largest number of dimensions of any tensor in it: those of a measurement have few."""
    return max((value.ndim for value in values.values() if isinstance(value, Tensor)), default=0)


def _is_weight(name: Any, value: Any) -> bool:
    """Whether it is a dense tensor with all its numbers in the file: an expanded one would take memory only when used."""
    if not isinstance(name, str) or not isinstance(value, Tensor) or value.device.type != "cpu":
        return False
    if value.layout is not torch.strided or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names))
