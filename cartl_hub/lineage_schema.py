"""Schema that a model's lineage must follow for cards, reports and fine-tuning to read it; it may hold more."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pydantic


@dataclass
class _Source:
    id: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None


@dataclass
class _SplitOff:
    seed: int
    test_share: float
    validation_share: float
    test_seed: int | None = None
    index_hash: str | None = None
    pixels: str | None = None


@dataclass
class _Data:
    id: str | None = None
    revision: str | None = None
    split: str | None = None
    license: str | None = None
    index_hash: str | None = None
    fingerprint: str | None = None
    num_images: int | None = None
    split_off: _SplitOff | None = None


@dataclass
class _Choice:
    name: str | None = None


@dataclass
class _ThreatModel:
    norm: str
    eps: float


@dataclass
class _Result:
    steps: int
    seconds: float
    images_per_second: float
    precision: str
    device: str
    weights: str
    stopped: str | None = None


@dataclass
class _ProbeArguments:
    lr: float


@dataclass
class _Probe:
    steps: int
    arguments: _ProbeArguments


@dataclass
class _Imported:
    file: str
    sha256: str
    format: str
    num_dropped: int
    url: str | None = None
    repo_id: str | None = None
    revision: str | None = None


@dataclass
class _Lineage:
    source: _Source | None = None
    data: _Data = field(default_factory=_Data)
    method: _Choice = field(default_factory=_Choice)
    threat_model: _ThreatModel | None = None
    batch_norm: _Choice | None = None
    arguments: dict[str, Any] | None = None
    result: _Result | None = None
    classifier: str | None = None
    probe: _Probe | None = None
    imported: _Imported | None = None
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    title: str | None = None
    tag: str | None = None
    command: str | None = None
    license: str | None = None


_LINEAGE = pydantic.TypeAdapter(_Lineage)


def check_lineage(lineage: Mapping[str, Any]) -> None:
    """Check that a lineage, as JSON, has entries of the expected types.

    Raises:
        ValueError: If it hasn't; the message names the first wrong entry and what was expected there.
    """
    try:
        _LINEAGE.validate_json(json.dumps(lineage), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("lineage", *first["loc"])))
        raise ValueError(f"{place}: {first['msg']}, got {first['input']!r:.200}.") from None
