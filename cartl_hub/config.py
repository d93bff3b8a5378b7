"""Conversion of a user's choices (attacks, methods, arguments) to plain JSON or YAML, and back."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import pydantic
import yaml

Choice = TypeVar("Choice")
_FRACTION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*([1-9]\d*)\s*")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that occurs twice in a mapping, where YAML's own loader keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Content of a YAML file.

    Raises:
        ValueError: If it can't be read.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except FileNotFoundError:
        raise ValueError(f"expected a YAML file in {path}, which does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"expected YAML, encoded as UTF-8, in {path}: {error}") from error
    except RecursionError:
        raise ValueError(f"expected YAML in {path}, got one that is nested too deeply.") from None


def to_dict(value: Any) -> Any:
    """JSON of a choice: a dataclass becomes its fields with its class under "name", except fields that its repr leaves out."""
    if is_dataclass(value) and not isinstance(value, type):
        shown = {field.name: to_dict(getattr(value, field.name)) for field in fields(value) if field.repr}
        return {"name": type(value).__name__} | shown
    if isinstance(value, Mapping):
        return {str(key): to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(
    config: Mapping[str, Any], kinds: Mapping[str, type], default: str | None = None, expected: tuple[type, ...] = (object,)
) -> Any:
    """The choice that :func:`to_dict` wrote, or that a recipe states; fractions like "8/255" are numbers.

    Args:
        config: Fields, with the class under "name".
        kinds: Classes by name.
        default: Name to use if none is stated; if only one kind is possible, that one.
        expected: Classes that the result must be an instance of.

    Raises:
        ValueError: On an unknown class or field, or a value of the wrong type; the message names what there is.
    """
    fitting = [name for name, kind in kinds.items() if issubclass(kind, expected)]
    if not isinstance(config, Mapping):
        raise ValueError(f"expected a mapping with a name, one of {', '.join(fitting)}; got {config!r}.")
    values = dict(config)
    name = values.pop("name", fitting[0] if len(fitting) == 1 else default)
    if name not in fitting:
        got = "the name is missing" if name is None else f"unknown name {name!r}{_hint(str(name), fitting)}"
        raise ValueError(f"{got}; expected one of {', '.join(fitting)}.")
    kind = kinds[name]
    hints = {field.name: get_type_hints(kind)[field.name] for field in fields(kind)}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{name} has no {key!r}{_hint(str(key), hints)}; it has {', '.join(hints)}.")
        choices: Any = tuple(choice for choice in (hints[key], *get_args(hints[key])) if is_dataclass(choice))
        if choices and isinstance(value, Mapping):
            try:
                values[key] = from_dict(value, kinds, expected=choices)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        elif choices and isinstance(value, (list, tuple)):
            try:
                values[key] = [from_dict(item, kinds, expected=choices) if isinstance(item, Mapping) else item for item in value]
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
        elif isinstance(value, bool) and bool not in (hints[key], *get_args(hints[key])):  # pydantic takes it for 0 or 1
            raise ValueError(f"{name} can't be made: {key}: expected no boolean, got {str(value).lower()}.")
        else:
            values[key] = _fractions(value, hints[key])
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except pydantic.ValidationError as error:
        problems = [
            f"{'.'.join(map(str, item['loc'])) or name}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        ]
        raise ValueError(f"{name} can't be made: {'; '.join(problems)}") from error


def with_changes(choice: Choice, changes: Mapping[str, Any], kinds: Mapping[str, type]) -> Choice:
    """A copy of a choice with other values.

    Args:
        choice: Dataclass among ``kinds``.
        changes: Values by field, as a recipe states them; "schedule.decay" is a field of the choice in ``schedule``.
        kinds: Classes by name.

    Raises:
        ValueError: As :func:`from_dict`, or if the owner of a field isn't a choice.
    """
    if not changes:
        return choice
    content = to_dict(choice)
    for path, value in changes.items():
        *parents, field = path.split(".")
        inner = content
        for parent in parents:
            inner = inner.get(parent)
            if not isinstance(inner, Mapping):
                raise ValueError(f"{type(choice).__name__} has no {path!r}: {parent!r} holds no other settings.")
        inner[field] = value
    return from_dict(content, kinds)


def _hint(word: str, words: Any) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _fractions(value: Any, hint: Any) -> Any:
    """Convert strings like "8/255" to numbers where numbers are expected."""
    if isinstance(value, (list, tuple)):
        return [_fractions(item, hint) for item in value]
    if isinstance(value, str) and float in (hint, *get_args(hint)) and (match := _FRACTION.fullmatch(value)):
        return float(match[1]) / float(match[2])
    return value
