"""The HTTP application: OpenAI's paths, /health, /metrics, and a page at / to chat with the model.

Every refusal is JSON with a sentence. An answer whose client has left is cancelled, so that its slot is free for the
next one. Read `protocol.py` for the fields, `service.py` for what becomes of them, and `run.py` for the process.
"""

import contextlib
import hmac
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...meshes import TrellaxError
from .answers import Job
from .errors import HttpError
from .protocol import AnswerSettings, ChatRequest, CompletionRequest, parse_body
from .responses import EventStream, answer_nobody, collect, error_response, fail, read_body, refuse, refuse_path
from .service import Service
from .timed_protocol import CONNECTION

_OPEN_PATHS = {"/", "/health"}
"""Paths that need no API key."""


_PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"


def build_app(service: Service) -> ASGIApp:
    """Return the application of a service, for any ASGI server; its engine must have been entered."""
    own = _Endpoints(service)
    routes = [
        Route("/", own.page),
        Route("/health", own.health),
        Route("/metrics", own.metrics),
        Route("/v1/models", own.models),
        Route("/v1/models/{name:path}", own.model),
        Route("/v1/completions", own.complete, methods=["POST"]),
        Route("/v1/chat/completions", own.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {TrellaxError: refuse, HTTPException: refuse_path, ClientDisconnect: answer_nobody}
    handlers[Exception] = fail
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), service)


class _Endpoints:
    """What each path answers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: Request) -> Any:
        """Answer /v1/completions."""
        return await self._answer(request, CompletionRequest, self._service.complete)

    async def chat(self, request: Request) -> Any:
        """Answer /v1/chat/completions."""
        return await self._answer(request, ChatRequest, self._service.chat)

    async def models(self, _: Request) -> Response:
        """List the only model."""
        return JSONResponse({"object": "list", "data": [self._describe_model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model of a name."""
        if request.path_params["name"] != self._service.name:
            raise HttpError("there is no such model here.", status=404, param="model", code="model_not_found")
        return JSONResponse(self._describe_model())

    async def health(self, _: Request) -> Response:
        """Tell load balancers whether new requests are answered."""
        state = "failed" if self._service.engine.error else "stopping" if self._service.is_stopping else "ok"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    async def metrics(self, _: Request) -> Response:
        """Print the numbers for Prometheus."""
        engine, open_ = self._service.engine.engine, self._service.engine.num_open
        metrics = self._service.metrics
        metrics.num_guessed_tokens, metrics.num_accepted_tokens = engine.guessed_tokens, engine.accepted_tokens
        gauges = {
            "slots": ("Slots of the engine", engine.sizes.slots),
            "slots_used": ("Slots in use", len(engine.scheduler.running)),
            "cache_tokens": ("Tokens for which the cache has pages", engine.sizes.cached_tokens),
            "cache_tokens_free": (
                "Tokens of pages that no answer has",
                engine.scheduler.num_free_pages * engine.sizes.page,
            ),
            "queue_length": ("Answers that wait for a slot", len(engine.scheduler.waiting)),
            "answers_open": ("Answers that have not ended", open_),
        }
        return PlainTextResponse(metrics.text(gauges), media_type="text/plain; version=0.0.4")

    async def page(self, _: Request) -> Response:
        """Show the page to chat with the model."""
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _PAGE_POLICY})

    def _describe_model(self) -> dict[str, Any]:
        own = self._service
        return {"id": own.name, "object": "model", "created": own.created, "owned_by": "trellax"}

    async def _answer(self, request: Request, kind: type[Any], begin: Callable[[Any], Awaitable[Job]]) -> ASGIApp:
        """Read and check a request, begin its answer, and return the response."""
        service = self._service
        if service.is_stopping:
            raise HttpError("the server is stopping.", fix="send the request to another one.", status=503)
        body: AnswerSettings = parse_body(kind, await read_body(request, service.limits))
        job = await begin(body)
        if body.stream:
            return EventStream(job, with_usage=body.has_usage_chunk, answer_s=service.limits.answer_s)
        return JSONResponse(await collect(job, request.receive, answer_s=service.limits.answer_s))


class _Guard:
    """Check the API key, count responses, and give each an id, around the application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._key = None if service.api_key is None else f"Bearer {service.api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        connection = scope.get("state", {}).get(CONNECTION)

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", f"req_{uuid.uuid4().hex}".encode())]
                # Paths of the application alone: a client may make up any number of others.
                path = "other" if message["status"] in {401, 404} else scope["path"]
                path = "/v1/models" if path.startswith("/v1/models/") else path
                self._service.metrics.responses[path, message["status"]] += 1
            await send(message)

        app = self._app if self._is_allowed(scope) else error_response(_no_key())
        with connection.answering() if connection else contextlib.nullcontext():
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
