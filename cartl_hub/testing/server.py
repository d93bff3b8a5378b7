"""HTTP on loopback: requests in, replies out, and faults in between. It knows nothing about repositories."""

import json
import logging
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote

from .errors import HubError
from .faults import Fault, Faults

logger = logging.getLogger(__name__)

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # linger for 0 s: close() sends RST in place of FIN


@dataclass(frozen=True)
class Request:
    """A request as it was received.

    Args:
        path: Path as sent, without the query: quoted slashes are still quoted.
    """

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes = field(repr=False)

    @property
    def segments(self) -> tuple[str, ...]:
        """Segments of the path, unquoted, so that a branch may have a slash in its name."""
        return tuple(unquote(segment, errors="surrogateescape") for segment in self.path.split("/")[1:])

    def json(self) -> Any:
        return parse_json(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Reply:
    """A reply; a HEAD request gets it without its body."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """A request that came in; the token itself is not kept.

    Args:
        path: Path as sent, without the query.
        query: Query as sent.
        status: Status of the reply; None if there was none, for a request that was not carried out.
        authorized: Whether there was an Authorization header.
        fault: Kind of the fault that hit it.
    """

    method: str
    path: str
    query: str
    status: int | None
    authorized: bool
    fault: str | None = None


def parse_json(text: bytes) -> Any:
    """Parse a JSON body.

    Raises:
        HubError: With 400 if it can't be parsed.
    """
    try:
        return json.loads(text or b"{}")
    except ValueError as error:
        raise HubError(400, f"Expected JSON: {error}") from error


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    body = json.dumps(value, default=str).encode()
    return Reply(body, status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def error_reply(error: HubError) -> Reply:
    headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {}) | error.headers
    return json_reply({"error": error.message, **error.body}, error.status, headers)


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1, running from its creation until :meth:`stop`.

    Args:
        port: Port to listen on; 0 takes a free one.
        answer: Function that makes the replies, in several threads at once.
        faults: Faults in force.
        seen: List that gets each request before the reply.
        errors: List that gets the exceptions of ``answer``, except for :class:`HubError`; the client gets a 500.
    """

    daemon_threads = False  # server_close() waits for them, so that no error comes late
    request_queue_size = 128

    def __init__(
        self, port: int, answer: Callable[[Request], Reply], faults: Faults, seen: list[Seen], errors: list[Exception]
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.answer, self.faults, self.seen, self.errors = answer, faults, seen, errors
        self.stopping = Event()
        self.connections: set[socket.socket] = set()
        self._thread = Thread(target=self.serve_forever, args=(0.02,), name="LocalHub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        for connection in list(self.connections):  # keep-alive ones would go on being served
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.stopping.set()
        self.server_close()
        self._thread.join()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Shut down without the FIN of the base class, which would come before a RST."""
        self.connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, Exception) and not isinstance(error, OSError):  # OSError: the client went away
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms pass between the head and the body

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        request = Request(self.command, path, parse_qs(query), self.headers, self._read_body())
        fault = self.server.faults.strike(request.method, request.path)
        reply = self._answer(request, fault)
        dropped = fault is not None and fault.kind == "drop"
        self.server.seen.append(
            Seen(
                request.method,
                request.path,
                query,
                None if dropped else reply.status,
                "Authorization" in self.headers,
                fault.kind if fault else None,
            )
        )
        if fault and fault.kind in ("drop", "lost"):
            self.close_connection = True
        else:
            self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _read_body(self) -> bytes:
        """Read the whole body, even if it is of no use: closing with unread bytes sends RST."""
        assert "Transfer-Encoding" not in self.headers, "the client sends bodies of a known length"
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("the client left in the middle of its request")
        return body

    def _answer(self, request: Request, fault: Fault | None) -> Reply:
        if fault and fault.kind in ("drop", "status"):
            retry = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return json_reply({"error": "injected"}, fault.status, retry)
        try:
            return self.server.answer(request)
        except HubError as error:
            return error_reply(error)
        except Exception as error:
            error.add_note(f"LocalHub, while answering {request.method} {request.path}")
            self.server.errors.append(error)
            return json_reply({"error": "Internal Server Error"}, 500)

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        body = reply.body
        kind = fault.kind if fault else None
        middle = len(body) // 2 if fault is None or fault.offset is None else min(fault.offset, len(body))
        if kind == "truncate":
            body = body[:middle]
        elif kind == "flip" and body:
            middle = min(middle, len(body) - 1)
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault and kind == "slow" and fault.offset is None:
            self.server.stopping.wait(fault.delay)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, _latin(value))
        self.end_headers()
        if self.command == "HEAD":
            body = b""
        if kind in ("cut", "reset"):
            self._break(body[:middle], reset=kind == "reset")
        elif fault and kind == "slow" and fault.offset is not None:
            self._trickle(body, middle, fault.delay)
        else:
            self.wfile.write(body)

    def _break(self, body: bytes, *, reset: bool) -> None:
        self.wfile.write(body)
        if reset:
            time.sleep(0.05)  # a RST takes back what has not left yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.close_connection = True

    def _trickle(self, body: bytes, offset: int, delay: float) -> None:
        self.wfile.write(body[:offset])
        for start in range(offset, len(body), _CHUNK):
            self.server.stopping.wait(delay)
            self.wfile.write(body[start : start + _CHUNK])

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _latin(value: str) -> str:
    """A value for a header, which can't hold line breaks, nor letters beyond Latin-1."""
    return " ".join(value.split()).encode("latin-1", "replace").decode("latin-1")
