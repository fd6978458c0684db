"""A server over loopback in a thread of this process, with a tiny model whose tokens are 64 letters."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import uvicorn
from trellax.hub.chat.template import ChatTemplate
from trellax.hub.model_folder import ModelSource
from trellax.hub.text_stream import Tokenizer
from trellax.meshes import DataError
from trellax.serve import Engine, Request
from trellax.serve.async_engine import AsyncEngine
from trellax.serve.http.run import uvicorn_config
from trellax.serve.http.service import Service

from ..models import answer_of, mesh_of, model_of, params_on

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 ."
CONFIG = model_of("llama", max_tokens=96)
NAME = "tiny"
TEMPLATE = ChatTemplate("{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}a ")
LONG = {"model": NAME, "prompt": "Hi", "temperature": 0, "max_tokens": 90}


class LetterTokenizer:
    """One token a letter, both ways, so that a text says which tokens it was made of."""

    def encode(self, text: str) -> list[int]:
        if odd := set(text) - set(LETTERS):
            raise DataError(f"there is no token for {min(odd)!r}.", fix="write letters.")
        return [LETTERS.index(letter) for letter in text]

    encode_prompt = encode

    def decode(self, ids: Sequence[int], /) -> str:
        return "".join(LETTERS[one] for one in ids)


TOKENIZER = LetterTokenizer()


@cache
def shared_engine() -> Engine:
    """Three slots, so that a few requests fill them; the cache is poisoned with NaN."""
    mesh = mesh_of("data=1")
    return Engine(
        CONFIG, params_on(CONFIG, mesh), mesh=mesh, slots=3, chunk=8, rounds=3, fill="nan", tokenizer=TOKENIZER
    )


def text_of(prompt: str, max_tokens: int, *, how: Any = None) -> str:
    """Return the text that a prompt must get, by recomputing the whole sequence for each token."""
    tokenizer = LetterTokenizer()
    request = Request(prompt=tuple(tokenizer.encode(prompt)), max_new_tokens=max_tokens)
    return tokenizer.decode(answer_of(CONFIG, replace(request, **(how or {})))[0])


class Server:
    """A client of the server at a port."""

    def __init__(self, service: Service, http: uvicorn.Server) -> None:
        self.service, self._http = service, http
        self._listening = http.servers[0].sockets[0]
        self.port = self._listening.getsockname()[1]

    def num_connections(self) -> int:
        """Number of connections that are open."""
        return len(self._http.server_state.connections)

    def stall(self, seconds: float) -> None:
        """Let the server do nothing for some seconds, as on a machine that is too busy."""
        self._http.servers[0].get_loop().call_soon_threadsafe(time.sleep, seconds)

    def shrink_buffers(self) -> None:
        """Let the system take little of what the next clients do not read."""
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)

    def ask(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return status and content: GET without a body, POST with one, as JSON unless it is bytes."""
        response = self.open(path, body, headers=headers)
        content, kind = response.read(), response.headers.get_content_type()
        return response.status, json.loads(content) if kind == "application/json" else content.decode()

    def open(self, path: str, body: Any = None, *, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
        """Send a request, and return its response before it is read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {"Content-Type": "application/json", "Connection": "close"} | (headers or {})
        connection.request("GET" if body is None else "POST", path, body=content, headers=own)
        return connection.getresponse()

    def events(self, path: str, body: Any) -> list[Any]:
        """Return the events of a streaming response, which must end with [DONE]."""
        response = self.open(path, {**body, "stream": True})
        assert response.status == 200
        assert response.headers.get_content_type() == "text/event-stream"
        *events, done, rest = response.read().decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def gauge(self, name: str) -> float:
        """Return a number of /metrics."""
        lines = self.ask("/metrics")[1].splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"trellax_{name} "))

    def wait_until_idle(self) -> None:
        """Wait until no answer is open and no slot in use."""
        end_s = time.monotonic() + 30
        while self.gauge("answers_open") or self.gauge("slots_used"):
            assert time.monotonic() < end_s, "a slot leaks"
            time.sleep(0.01)


@contextmanager
def slow_tokens(seconds: float = 0.005) -> Iterator[None]:
    """Make a token take so long at least, however fast the machine is: a long answer half a second."""
    engine = shared_engine()
    engine.on_token = lambda *_: time.sleep(seconds)
    try:
        yield
    finally:
        engine.on_token = None


@contextmanager
def running(*, max_waiting: int = 64, tokenizer: Tokenizer = TOKENIZER, **settings: Any) -> Iterator[Server]:
    """Run a server; at the end no slot may be in use."""
    source = ModelSource(config=CONFIG, tokenizer=tokenizer, end_ids=(), begin_ids=(7,), read=lambda _: None)
    engine = AsyncEngine(shared_engine(), max_waiting=max_waiting)
    own: dict[str, Any] = {"name": NAME, "engine": engine, "source": source, "template": TEMPLATE}
    service = Service(**(own | settings))
    config = uvicorn_config(service)
    config.port = 0
    server = uvicorn.Server(config)
    is_up = threading.Event()

    async def serve() -> None:
        async with service.engine:
            serving = asyncio.create_task(server.serve())
            while not (server.started or serving.done()):
                await asyncio.sleep(0.005)
            is_up.set()
            await serving

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert is_up.wait(30)
        yield Server(service, server)
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
    if engine.error:
        # Its slots stay in use: the next server takes a new one.
        shared_engine.cache_clear()
    assert engine.error is None
    assert shared_engine().scheduler.is_idle
    assert engine.num_open == 0
