"""Bound the time in which a client must send the head of a request and take the end of its answer.

uvicorn waits for both for ever, so that clients which send or read a letter a minute would keep all connections. The
application tells by `answering` when it has a request; the time runs while it has none. Read `run.py` next.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .errors import HttpError, error_body

CONNECTION = "trellax.connection"
"""Key of the connection in the state of an ASGI scope."""


class TimedProtocol(asyncio.Protocol):
    """uvicorn's protocol of one connection, which is closed where the client is too slow.

    Args:
        head_s: most seconds from the connection, or the end of an answer, to the end of a request's headers.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        head_s: float,
    ) -> None:
        # Not httptools, which bounds no length of headers.
        self._inner = H11Protocol(config, server_state, {**app_state, CONNECTION: self}, _loop)
        # uvicorn's own answer to what is not HTTP is plain text.
        self._inner.send_400_response = self._refuse
        self._head_s = head_s
        self._timer: asyncio.TimerHandle | None = None
        self._num_running = 0
        self._has_head = self._has_answered = self._is_lost = False
        self._num_unsent: int | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Stop the time while the application has a request; the next one may begin before this has ended."""
        self._stop_timer()
        self._num_running += 1
        self._has_answered = False
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running and not self._is_lost:
                self._start_timer()

    def mark_answered(self) -> None:
        """Note that the head of the answer has been sent, so that no other can be."""
        self._has_answered = True

    def connection_made(self, transport: Any) -> None:
        """Begin, as asyncio calls it."""
        self._transport = transport
        self._inner.connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Read bytes, as asyncio calls it."""
        self._has_head = True
        self._inner.data_received(data)

    def eof_received(self) -> None:
        """Pass on that the client sends no more, as asyncio calls it."""
        self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """End, as asyncio calls it."""
        self._is_lost = True
        self._stop_timer()
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on that the client reads too slowly, as asyncio calls it."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the client reads again, as asyncio calls it."""
        self._inner.resume_writing()

    def _start_timer(self) -> None:
        self._has_head = False
        self._timer = asyncio.get_running_loop().call_later(self._head_s, self._expire)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _expire(self) -> None:
        """Close the connection; one whose client takes nothing of what is left to send is cut at the next call."""
        if not self._transport.is_closing():
            if self._has_head:
                error = HttpError(f"the headers did not arrive within {self._head_s:g} s.", status=408)
                self._transport.write(_response("408 Request Timeout", error))
            self._transport.close()
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent == self._num_unsent:
            self._transport.abort()
            return
        self._num_unsent = num_unsent
        self._start_timer()

    def _refuse(self, msg: str) -> None:
        """Answer what is not HTTP, unless the answer to this request has begun."""
        if not self._has_answered:
            self._transport.write(_response("400 Bad Request", HttpError(f"the request is not HTTP: {msg}")))
        self._transport.close()


def _response(status: str, error: HttpError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body
