"""The one exception that routes answer with a status."""

from collections.abc import Mapping
from typing import Any


class HubError(Exception):
    """A request that the Hub refuses.

    Args:
        status: HTTP status.
        message: Message for the user.
        code: Code by which clients tell their exceptions apart, such as ``EntryNotFound``.
        headers: Additional headers.
        body: Content of the reply beside the message.
    """

    def __init__(
        self, status: int, message: str, code: str = "", *, headers: Mapping[str, str] | None = None, **body: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers, self.body = status, message, code, dict(headers or {}), body
