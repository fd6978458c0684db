"""Bound the time in which a client must send the head of a request and take the end of its answer.

uvicorn waits for both for ever, so that clients which send or read a letter a minute would keep all connections. The
application tells by `answering` when it has a request; the time runs while it has none:

    connected, or answered -> idle_s without a byte of the next request -> closed without a word
    the first byte of it   -> head_s until the headers are whole        -> 408
    answered, not all sent -> head_s without a byte taken               -> cut

Only the client's own time counts: where this process was late, what arrived meanwhile is read first, and a request
whose head is whole is answered. Read `run.py` next.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from .errors import HttpError, error_body

CONNECTION = "trellax.connection"
"""Key of the connection in the state of an ASGI scope."""


class TimedProtocol(asyncio.Protocol):
    """uvicorn's protocol of one connection, which is closed where the client is too slow.

    Args:
        idle_s, head_s: as of `Limits`.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        head_s: float,
        idle_s: float,
    ) -> None:
        # Not httptools, which bounds no length of headers.
        self._inner = H11Protocol(config, server_state, {**app_state, CONNECTION: self}, _loop)
        # uvicorn's own answer to what is not HTTP is plain text.
        self._inner.send_400_response = self._refuse
        self._head_s, self._idle_s = head_s, idle_s
        self._timer: asyncio.TimerHandle | None = None
        self._num_running = 0
        self._has_byte = self._is_lost = False
        self._num_unsent = 0
        self._begun: RequestResponseCycle | None = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Stop the time while the application has a request; the next one may begin before this has ended."""
        self._stop_timer()
        self._begun = self._inner.cycle
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running and not self._is_lost:
                self._wait_for_head()

    def connection_made(self, transport: Any) -> None:
        """Begin, as asyncio calls it."""
        self._transport = transport
        self._inner.connection_made(transport)
        self._start_timer(self._idle_s)

    def data_received(self, data: bytes) -> None:
        """Read bytes, as asyncio calls it."""
        if not self._num_running and not self._has_byte:
            self._has_byte = True
            self._start_timer(self._head_s)
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

    def _wait_for_head(self) -> None:
        """Begin the time after an answer; the next request may have begun before."""
        self._has_byte = bool(self._inner.conn.trailing_data[0])
        self._num_unsent = self._transport.get_write_buffer_size()
        self._start_timer(self._head_s if self._has_byte or self._num_unsent else self._idle_s)

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _expire(self) -> None:
        """Close the connection, unless the client is taking its answer; cut it where the client takes nothing."""
        # A whole head, for which the application has not been called yet: this process was late, not the client.
        if self._inner.cycle is not self._begun:
            return
        num_unsent = self._transport.get_write_buffer_size()
        if num_unsent and num_unsent == self._num_unsent:
            self._transport.abort()
            return
        if self._num_unsent or self._transport.is_closing():
            self._wait_for_head()
            return
        if self._has_byte:
            error = HttpError(f"the headers did not arrive within {self._head_s:g} s.", status=408)
            self._transport.write(_response("408 Request Timeout", error))
        self._transport.close()
        self._wait_for_head()

    def _refuse(self, msg: str) -> None:
        """Answer what is not HTTP, unless an answer has begun and not ended."""
        cycle = self._inner.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self._transport.write(_response("400 Bad Request", HttpError(f"the request is not HTTP: {msg}")))
        self._transport.close()


def _response(status: str, error: HttpError) -> bytes:
    body = json.dumps(error_body(error)).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + body
