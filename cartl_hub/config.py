"""What a user chooses (attacks, methods, arguments) as plain JSON or YAML, and back."""

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pydantic

_FRACTION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*")


def to_dict(value: Any) -> Any:
    """JSON of a choice: a dataclass becomes its fields with its class under "name"."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"name": type(value).__name__} | {field.name: to_dict(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(config: Mapping[str, Any], kinds: Mapping[str, type], default: str | None = None) -> Any:
    """The choice that :func:`to_dict` wrote, or that a recipe states; fractions like "8/255" are numbers.

    Args:
        config: Fields, with the class under "name".
        kinds: Classes by name.
        default: Name where none is stated.

    Raises:
        ValueError: On an unknown class or field, or a value of the wrong type; the message names what there is.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a mapping with a name, one of {', '.join(kinds)}; got {config!r}.")
    values = dict(config)
    name = values.pop("name", default)
    if name not in kinds:
        raise ValueError(f"unknown name {name!r}{_hint(str(name), kinds)}; expected one of {', '.join(kinds)}.")
    kind = kinds[name]
    known = [field.name for field in fields(kind)]
    for key in values:
        if key not in known:
            raise ValueError(f"{name} has no {key!r}{_hint(key, known)}; it has {', '.join(known)}.")
    for key, value in values.items():
        if isinstance(value, Mapping) and (choices := _choices(kind, key)):
            default = choices[0].__name__ if len(choices) == 1 and not inspect.isabstract(choices[0]) else None
            values[key] = from_dict(value, kinds, default=default)
        elif isinstance(value, str) and (match := _FRACTION.fullmatch(value)):
            values[key] = float(match[1]) / float(match[2])
    try:
        return pydantic.TypeAdapter(kind, config=None).validate_python(values)
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or name}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        ]
        raise ValueError(f"{name} can't be made: {'; '.join(problems)}") from error


def _hint(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _choices(kind: type, key: str) -> list[type]:
    """Dataclasses that a field can hold."""
    hint = get_type_hints(kind)[key]
    return [choice for choice in (hint, *get_args(hint)) if is_dataclass(choice) and isinstance(choice, type)]
