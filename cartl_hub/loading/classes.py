"""Maps the labels of a data set to classes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel
from torch import Tensor

from ..data import DataError, UnknownClassError, listed
from .arguments import Notes


@dataclass
class Classes:
    """Mapping from labels to classes.

    Args:
        known: Classes that a model has; labels are matched to these by name.
        given: The user's names for integer labels.
        notes: Notes to add decisions to.
    """

    known: Sequence[str] | None
    given: Sequence[str] | None
    notes: Notes

    def names(self, feature: Any, column: str, raw: Mapping[str, list[Any]]) -> tuple[str, ...]:
        """Names of the classes, in order."""
        given = self.given_names(feature)
        return _different(self._found(feature, column, raw) if given is None else given, column)

    def given_names(self, feature: Any) -> Sequence[str] | None:
        """Names given by the model, the column or the user; None if none does."""
        if not isinstance(feature, ClassLabel):
            return self.known or self.given
        if self.given is not None:
            self.notes.add("label_names is not used: the label column has names of its own")
        return self.known or feature.names

    def names_of_stream(self, feature: Any, column: str) -> tuple[str, ...]:
        """Names of the classes, as :meth:`names`, if they can't be found among the labels.

        Raises:
            DataError: If no names are given, or the same ones.
        """
        names = self.given_names(feature)
        if names is None:
            raise DataError(f"expected class names for the labels in {column!r} of a stream, got none; pass label_names=...")
        return _different(names, column)

    def _found(self, feature: Any, column: str, raw: Mapping[str, list[Any]]) -> list[Any]:
        """Classes that occur among labels without names."""
        if feature.dtype == "bool":
            return [False, True]
        values = {value for split in raw.values() for value in split if value is not None}
        if len({isinstance(value, str) for value in values}) > 1:
            kinds = ", ".join(f"{split[0]!r} in {role}" for role, split in raw.items())
            raise DataError(f"expected labels of one kind in {column!r} of all splits, got numbers and strings: {kinds}.")
        found = sorted(values)
        if len(found) > max(1000, sum(map(len, raw.values())) // 2):
            raise DataError(f"expected classes in {column!r}, got {len(found)} different values; is it the right column?")
        if found and found[0] == -1 and found != [-1, 1]:  # the usual mark of a missing label: its row is an error
            del found[0]
        if feature.dtype.lstrip("u").startswith("int") and found != list(range(len(found))):
            self.notes.add(f"labels are not 0 to K-1 ({listed(found)}): classes are numbered in their order")
        return found

    def numbers(self, feature: Any, names: Sequence[str]) -> dict[Any, int]:
        """Class of each raw label of a column: by its name, which is its position if the names aren't numbers."""
        if isinstance(feature, ClassLabel):
            named = dict(enumerate(feature.names))
        elif self.given is None and all(re.fullmatch(r"-?\d+", name) for name in names):
            named = {int(name): name for name in names}
        else:
            named = dict(enumerate(self.given or names))
        index = {name: number for number, name in enumerate(names)}
        numbers = {raw: index[name] for raw, name in named.items() if name in index}
        if feature is None:
            return index | numbers
        return index if "string" in feature.dtype else numbers

    def labels(self, raw: Sequence[Any], feature: Any, column: str, names: tuple[str, ...], role: str) -> Tensor:
        classes = self.numbers(feature, names)
        for row, value in enumerate(raw):
            if value not in classes:
                own = getattr(feature, "names", ())
                expected, got = (names, own[value]) if value in range(len(own)) else (classes, value)
                raise UnknownClassError(
                    f"row {row} of the {role} split: expected one of {listed(expected)} in {column!r}, got {got!r}."
                )
        return torch.tensor([classes[value] for value in raw])


def _different(names: Iterable[Any], column: str) -> tuple[str, ...]:
    """Names of classes as strings.

    Raises:
        DataError: If there are fewer than two, or two are the same.
    """
    names = tuple(map(str, names))
    if len(set(names)) < max(2, len(names)):
        raise DataError(f"expected two or more different classes in {column!r}, got {listed(names) or 'none'}.")
    return names
