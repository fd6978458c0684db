"""The HTTP application: OpenAI's paths, /health, /metrics, and a page at / to chat with the model.

Every refusal is JSON with a sentence. An answer whose client has left is cancelled, so that its slot is free for the
next one. Read `protocol.py` for the fields, `service.py` for what becomes of them, and `run.py` for the process.
"""

import asyncio
import contextlib
import hmac
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...meshes import ServeError, TrellaxError
from .answers import Job
from .connection import run_while_connected
from .errors import HttpError, error_body, status_of
from .protocol import AnswerSettings, ChatRequest, CompletionRequest, parse_body
from .service import Service

_OPEN_PATHS = {"/", "/health"}
"""Paths that need no API key."""

_LAST_S = 5.0
"""Most seconds for a client to take the last event of a stream."""


def build_app(service: Service) -> ASGIApp:
    """Return the application of a service, for any ASGI server; its engine must have been entered."""

    async def complete(request: Request) -> Any:
        return await _answer(request, service, CompletionRequest, service.complete)

    async def chat(request: Request) -> Any:
        return await _answer(request, service, ChatRequest, service.chat)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_describe_model(service)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.name:
            raise HttpError("there is no such model here.", status=404, param="model", code="model_not_found")
        return JSONResponse(_describe_model(service))

    async def health(_: Request) -> Response:
        state = "failed" if service.engine.error else "stopping" if service.is_stopping else "ok"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    async def metrics(_: Request) -> Response:
        text = service.metrics.text(_gauges(service))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def page(_: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _PAGE_POLICY})

    routes = [
        Route("/", page),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {TrellaxError: _refuse, HTTPException: _refuse_path, ClientDisconnect: _forget}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


class _Guard:
    """Check the API key, and count responses, around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._key = None if service.api_key is None else f"Bearer {service.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths of the application alone: a client may make up any number of others.
                path = "other" if message["status"] in {401, 404} else scope["path"]
                path = "/v1/models" if path.startswith("/v1/models/") else path
                self._service.metrics.responses[path, message["status"]] += 1
            await send(message)

        app = self._app if self._is_allowed(scope) else _error_response(_no_key())
        await app(scope, receive, count)

    def _is_allowed(self, scope: Scope) -> bool:
        if self._key is None or scope["path"] in _OPEN_PATHS:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        # In constant time: how long a comparison takes must not tell how much of a guess is right.
        return hmac.compare_digest(given, self._key)


def _no_key() -> HttpError:
    return HttpError(
        "the API key is missing or wrong.",
        fix="send the header `Authorization: Bearer KEY`.",
        status=401,
        code="invalid_api_key",
    )


async def _answer(
    request: Request, service: Service, kind: type[Any], begin: Callable[[Any], Awaitable[Job]]
) -> ASGIApp:
    """Read and check a request, begin its answer, and return the response."""
    if service.is_stopping:
        raise HttpError("the server is stopping.", fix="send the request to another one.", status=503)
    body: AnswerSettings = parse_body(kind, await _read_body(request, service))
    job = await begin(body)
    if body.stream:
        return _EventStream(job, with_usage=body.has_usage_chunk, answer_s=service.limits.answer_s)
    try:
        answer = await run_while_connected(request.receive, job.collect(), timeout_s=service.limits.answer_s)
    except ServeError as error:
        raise _failed(error) from None
    except TimeoutError:
        raise _too_slow(service.limits.answer_s) from None
    finally:
        job.cancel()
    return JSONResponse(answer)


async def _read_body(request: Request, service: Service) -> bytes:
    limits = service.limits
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


class _EventStream:
    """A response of server-sent events; it ends with `[DONE]`, or with an error after which nothing comes."""

    def __init__(self, job: Job, *, with_usage: bool, answer_s: float) -> None:
        self._job, self._with_usage, self._answer_s = job, with_usage, answer_s

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
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
    return error if isinstance(error, HttpError) else HttpError(error.problem, fix=error.fix, status=500)


def _too_slow(answer_s: float) -> HttpError:
    return HttpError(f"the answer did not end within {answer_s:g} s.", fix="ask for fewer tokens.", status=504)


def _describe_model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "trellax"}


def _gauges(service: Service) -> dict[str, tuple[str, float]]:
    scheduler, engine = service.engine.engine.scheduler, service.engine.engine
    return {
        "slots": ("Slots of the engine", engine.sizes.slots),
        "slots_used": ("Slots in use", len(scheduler.running)),
        "queue_length": ("Answers that wait for a slot", len(scheduler.waiting)),
        "answers_open": ("Answers that have not ended", service.engine.num_open),
    }


def _error_response(error: TrellaxError) -> JSONResponse:
    status = status_of(error)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}.get(status)
    # A body that was not read would be taken for the next request.
    extra = {"Connection": "close"} if status in {408, 413, 415} else {}
    return JSONResponse(error_body(error), status_code=status, headers={**(headers or {}), **extra})


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, TrellaxError)
    return _error_response(error)


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: "there is no such path.", 405: f"this path takes no {request.method}."}.get(
        error.status_code, error.detail
    )
    fix = "see /v1/models, /v1/completions and /v1/chat/completions."
    return _error_response(HttpError(what, fix=fix, status=error.status_code))


async def _forget(_request: Request, _error: Exception) -> Response:
    """Answer nobody: the client has left."""
    return Response(status_code=499)
