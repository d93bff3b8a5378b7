"""The YAML block at the top of a README.md: checked, and turned into the tags that lists are filtered by."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from ..licenses import LICENSES

_BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_STRINGS = ("library_name", "pipeline_tag", "license_name", "license_link", "base_model_relation")
_STRING_LISTS = ("license", "language", "tags", "datasets", "metrics", "base_model", "task_categories", "size_categories")


def card_metadata(text: str) -> dict[str, Any]:
    """The metadata of a card; empty if there is none or it can't be read."""
    try:
        metadata = _parse(text)
    except ValueError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def card_errors(text: str) -> list[str]:
    """Errors in the metadata of a card, in the Hub's words."""
    try:
        metadata = _parse(text)
    except ValueError as error:
        return [f"YAML metadata error: {error}"]
    if metadata is None:
        return []
    if not isinstance(metadata, dict):
        return [f"YAML metadata must be a mapping, got {type(metadata).__name__}"]
    errors = [f'"{key}" must be a string' for key in _STRINGS if not isinstance(metadata.get(key, ""), str)]
    for key in _STRING_LISTS:
        if not all(isinstance(value, str) for value in as_list(metadata.get(key))):
            errors.append(f'"{key}" must be a string or an array of strings')
    for key in ("base_model", "datasets"):
        for value in as_list(metadata.get(key)):
            if isinstance(value, str) and not _REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from the Hub.')
    for value in as_list(metadata.get("license")):
        if isinstance(value, str) and value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    return errors + _index_errors(metadata.get("model-index", []))


def hub_tags(metadata: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The tags of a card and those that the Hub adds.

    Args:
        metadata: Metadata of the card.
        paths: Paths of the files in the repository.
    """
    tags = [metadata.get("library_name"), *as_list(metadata.get("tags")), metadata.get("pipeline_tag")]
    if any(path.endswith(".safetensors") for path in paths):
        tags.append("safetensors")
    tags += as_list(metadata.get("language"))
    for key, prefix in (("datasets", "dataset"), ("license", "license"), ("base_model", "base_model")):
        tags += [f"{prefix}:{value}" for value in as_list(metadata.get(key))]
    relation = metadata.get("base_model_relation", "finetune")
    tags += [f"base_model:{relation}:{value}" for value in as_list(metadata.get("base_model"))]
    for key in ("task_categories", "size_categories"):
        tags += [f"{key}:{value}" for value in as_list(metadata.get(key))]
    return list(dict.fromkeys(str(tag) for tag in [*tags, "region:us"] if tag))


def as_list(value: Any) -> list[Any]:
    """A value that cards may give as one or several, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _parse(text: str) -> Any:
    """The block's value, or None without a block.

    Raises:
        ValueError: If it is not YAML.
    """
    block = _BLOCK.match(text)
    try:
        return yaml.safe_load(block.group(1)) if block else None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _index_errors(index: Any) -> list[str]:
    """Errors in ``model-index``, the results of evaluations."""
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for number, model in enumerate(index):
        place = f"model-index[{number}]"
        if not isinstance(model, dict) or not isinstance(model.get("name"), str) or not isinstance(model.get("results"), list):
            errors.append(f'"{place}" must have a name and an array of results')
            continue
        for result_number, result in enumerate(model["results"]):
            where = f"{place}.results[{result_number}]"
            errors += [f'"{where}.{key}" is required' for key in _missing(result, ("task.type", "dataset.type", "dataset.name"))]
            metrics = result.get("metrics") if isinstance(result, dict) else None
            if not isinstance(metrics, list) or any(_missing(metric, ("type", "value")) for metric in metrics):
                errors.append(f'"{where}.metrics" must be an array of a type and a value each')
    return errors


def _missing(value: Any, keys: Iterable[str]) -> list[str]:
    """The dotted keys that a mapping lacks."""
    missing = []
    for key in keys:
        found = value
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is None:
            missing.append(key)
    return missing
