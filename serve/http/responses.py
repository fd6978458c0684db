"""Read bodies of requests, and write responses: JSON at once, server-sent events as they come, and refusals."""

import asyncio
import contextlib
import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from ...meshes import ServeError, TrellaxError
from ..async_engine import EngineStoppedError
from .answers import Job
from .connection import run_while_connected
from .errors import HttpError, error_body, status_of
from .service import Limits

_LAST_S = 30.0
"""Most seconds for a client to take the last event of a stream."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        HttpError: it is of another type than JSON, too long, or too slow.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A page of another origin cannot send this type without asking, so no web page can use a server on loopback.
    if kind != "application/json":
        raise HttpError(
            f"the body is of type {kind[:60] or 'none'}, not application/json.",
            fix="send the header `Content-Type: application/json`.",
            status=415,
        )
    parts, num_bytes = [], 0
    try:
        async with asyncio.timeout(limits.body_s):
            async for part in request.stream():
                num_bytes += len(part)
                if num_bytes > limits.body_bytes:
                    raise HttpError(f"the body has more than {limits.body_bytes} bytes.", status=413)
                parts.append(part)
    except TimeoutError:
        raise HttpError(f"the body did not arrive within {limits.body_s:g} s.", status=408) from None
    return b"".join(parts)


async def collect(job: Job, receive: Receive, *, answer_s: float) -> dict[str, Any]:
    """Wait for all choices of a job, and return the JSON of the response; nothing of it runs on afterwards.

    Raises:
        ClientDisconnect: the client has left.
        HttpError: the answer failed, or took too long.
    """
    try:
        return await run_while_connected(receive, job.collect(), timeout_s=answer_s)
    except ServeError as error:
        raise _failed(error) from None
    except TimeoutError:
        raise _too_slow(answer_s) from None
    finally:
        job.cancel()


class EventStream:
    """A response of server-sent events; it ends with `[DONE]`, or with an error after which nothing comes."""

    def __init__(self, job: Job, *, with_usage: bool, answer_s: float) -> None:
        self._job, self._with_usage, self._answer_s = job, with_usage, answer_s

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as ASGI calls it."""
        try:
            await run_while_connected(receive, self._send_all(send), timeout_s=None)
        except ClientDisconnect:
            return
        finally:
            self._job.cancel()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last = "[DONE]"
        try:
            async with (
                asyncio.timeout(self._answer_s),
                contextlib.aclosing(self._job.chunks(with_usage=self._with_usage)) as chunks,
            ):
                async for chunk in chunks:
                    await send(_event(json.dumps(chunk, ensure_ascii=False, separators=(",", ":"))))
        except ServeError as error:
            last = json.dumps(error_body(_failed(error)))
        except TimeoutError:
            last = json.dumps(error_body(_too_slow(self._answer_s)))
        # A client that reads nothing would hold this for ever.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await send(_event(last))
                await send({"type": "http.response.body", "body": b""})


def _event(data: str) -> Message:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


def _failed(error: ServeError) -> HttpError:
    """Return the error for an answer that the engine could not end: no fault of the request."""
    if isinstance(error, HttpError):
        return error
    return HttpError(error.problem, fix=error.fix, status=503 if isinstance(error, EngineStoppedError) else 500)


def _too_slow(answer_s: float) -> HttpError:
    return HttpError(f"the answer did not end within {answer_s:g} s.", fix="ask for fewer tokens.", status=504)


def error_response(error: TrellaxError) -> JSONResponse:
    """Return the response for an error."""
    status = status_of(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(status)
    # A body that was not read would be taken for the next request.
    extra = {"Connection": "close"} if status in {408, 413, 415} else {}
    return JSONResponse(error_body(error), status_code=status, headers={**(headers or {}), **extra})


async def refuse(_: Request, error: Exception) -> Response:
    """Answer a request that raised a `TrellaxError`."""
    assert isinstance(error, TrellaxError)
    return error_response(error)


async def refuse_path(request: Request, error: Exception) -> Response:
    """Answer a request for a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path.", 405: f"this path takes no {request.method}."}.get(
        error.status_code, error.detail
    )
    fix = "see /v1/models, /v1/completions and /v1/chat/completions."
    return error_response(HttpError(what, fix=fix, status=error.status_code))


async def fail(_request: Request, _error: Exception) -> Response:
    """Answer a request that met a mistake of the server, whose traceback goes to stderr alone."""
    return error_response(HttpError("the server failed.", fix="report what its stderr says.", status=500))


async def answer_nobody(_request: Request, _error: Exception) -> Response:
    """Answer nobody: the client has left."""
    return Response(status_code=499)
