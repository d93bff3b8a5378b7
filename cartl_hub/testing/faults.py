"""Faults of the network and of the server, for tests of how a client handles them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from threading import Lock
from typing import Literal, get_args

Kind = Literal["status", "drop", "lost", "cut", "reset", "truncate", "flip", "slow"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong with some requests.

    ========== ==================================================================================================
    status     Nothing is done, and the reply has ``status``.
    drop       Nothing is done, and the connection closes without a reply.
    lost       What was asked for is done, and the connection closes without a reply.
    cut        The connection closes (FIN) after ``offset`` bytes of the body.
    reset      The connection breaks (RST) after ``offset`` bytes of the body.
    truncate   The body ends after ``offset`` bytes, and Content-Length says so.
    flip       The byte at ``offset`` of the body is another one.
    slow       The reply starts after ``delay`` seconds; or, with ``offset``, at once, and from that byte of the body on
               there are ``delay`` seconds before every 64 KiB.
    ========== ==================================================================================================

    Args:
        kind: Kind of fault, one of the above.
        method: HTTP method, or ``*``.
        path: Pattern of the path as it is sent, without the query, such as ``*/resolve/*/model.safetensors``; ``*`` also matches
            slashes. The bytes of LFS files come from ``/cdn/<type>s/<repository>/<commit>/<path>``.
        at: Number of the first matching request that is hit, from 1.
        times: Number of requests hit from then on; ``math.inf`` for all.
        status: HTTP status, e.g. 500, 503 or 429.
        retry_after: Seconds for the ``Retry-After`` header.
        offset: Offset in bytes; None is the middle of the body.
        delay: Delay in seconds.

    Raises:
        ValueError: On an unknown kind, or numbers out of range.
    """

    kind: Kind
    method: str = "*"
    path: str = "*"
    at: int = 1
    times: float = 1
    status: int = 500
    retry_after: int | None = None
    offset: int | None = None
    delay: float = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        if self.at < 1 or self.times < 1:
            raise ValueError(f"at and times count from 1, got at={self.at}, times={self.times}; math.inf is for all requests.")
        if not 400 <= self.status <= 599:
            raise ValueError(f"status must be one of an error, 400 to 599, got {self.status}.")


@dataclass
class Injection:
    """A fault in force.

    Args:
        fault: The fault.
        matched: Number of requests so far that it could have hit.
        hits: Number of requests that it hit. A test whose fault has none tests nothing.
    """

    fault: Fault
    matched: int = 0
    hits: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Count a request and return whether it is hit."""
        if not (fnmatchcase(method, self.fault.method) and fnmatchcase(path, self.fault.path)):
            return False
        self.matched += 1
        struck = self.fault.at <= self.matched < self.fault.at + self.fault.times
        self.hits += struck
        return struck


class Faults:
    """The faults in force; all of them count a request, and the one added first hits it."""

    def __init__(self) -> None:
        self._injections: list[Injection] = []
        self._lock = Lock()

    @contextmanager
    def injected(self, fault: Fault) -> Iterator[Injection]:
        """Have ``fault`` in force inside the block."""
        injection = Injection(fault)
        with self._lock:
            self._injections.append(injection)
        try:
            yield injection
        finally:
            with self._lock:
                self._injections = [other for other in self._injections if other is not injection]

    def strike(self, method: str, path: str) -> Fault | None:
        """The fault that hits this request."""
        with self._lock:
            struck = [injection.fault for injection in self._injections if injection.strikes(method, path)]
        return struck[0] if struck else None
