"""The one exception that routes answer with a status."""

from collections.abc import Mapping
from typing import Any


class HubError(Exception):
    """A request that the Hub refuses.

    Args:
        status: Of HTTP.
        message: For people.
        code: What clients tell their exceptions apart by, such as ``EntryNotFound``.
        headers: More of them.
        body: What the reply holds beside the message.
    """

    def __init__(
        self, status: int, message: str, code: str = "", *, headers: Mapping[str, str] | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.body = status, message, code, dict(headers or {}), body
