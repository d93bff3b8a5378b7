"""Reads report.json into content that follows ``report.schema.json``."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
SCHEMA = "urn:cartl-hub:schema:report:2"  # the "$id" of report.schema.json


def read_content(path: Path) -> dict[str, Any]:
    """Content of a report.json that follows the schema, in the terms of the present version.

    Raises:
        ValueError: If there is none, or it doesn't follow the schema.
    """
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except FileNotFoundError:
        raise ValueError(f"expected a report in {path}, which does not exist.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"expected a report of cartl_hub in {path}, got something else ({error!r}).") from error
    if isinstance(version, bool) or version not in (1, SCHEMA_VERSION):
        raise ValueError(f"expected a report of schema version 1 or {SCHEMA_VERSION} in {path}, got {version}; update cartl_hub.")
    try:
        # as it is written: without NaN, and encodable
        json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
        content = _from_version_1(content) if version == 1 else content
        _check_schema(content)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise damaged(path, reason) from error
    return content


def damaged(path: Path, reason: str) -> ValueError:
    """Error for a report that can't be used."""
    return ValueError(f"expected a whole report in {path}, got a damaged one ({reason.removesuffix('.')}).")


def _from_version_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert to the terms of version 2: each attack's figure was its own, on every correctly classified image."""
    own = {"alone": True, "attacked": content["clean"]["correct"], "seconds": None, "passes": None}
    attacks = {name: own | result for name, result in content["attacks"].items()}
    new = {"$schema": SCHEMA, "schema_version": SCHEMA_VERSION, "attacks": attacks, "source": None, "dropped": []}
    return {**content, **new}


@cache
def _validator() -> Any:
    import jsonschema

    schema = json.loads(Path(__file__).with_name("report.schema.json").read_bytes())
    return jsonschema.Draft202012Validator(schema)


def _check_schema(content: Mapping[str, Any]) -> None:
    from jsonschema.exceptions import best_match

    if error := best_match(_validator().iter_errors(content)):
        place = ".".join(map(str, error.absolute_path))
        raise ValueError(f"{place or 'report'}: {error.message:.200}")
