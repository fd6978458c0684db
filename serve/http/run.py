"""Run the server in this process until a signal ends it.

SIGTERM and SIGINT end it gently: what was begun ends, what is new is refused with 503. A second signal cancels the
rest.
"""

import asyncio
import contextlib
import functools
import signal
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn

from ...meshes import ServeError
from ...meshes.errors import shown
from .app import build_app
from .service import Service
from .timed_protocol import TimedProtocol

_CLOSE_S = 10
"""Most seconds for clients to take the ends of their answers, once all have been decoded."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address, before the model is loaded; port 0 takes any free port.

    Raises:
        ServeError: there is no such address, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        # With SO_REUSEADDR, so that a server that has ended does not hold its port for a minute.
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ServeError(
            f"--host {shown(host)} --port {port} cannot be bound: {why}.", fix="choose an address and a free port."
        ) from None


def url_of(bound: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run_server(service: Service, bound: socket.socket, *, on_ready: Callable[[], None]) -> None:
    """Serve on a bound socket until a signal; `on_ready` is called once requests are answered."""
    asyncio.run(_serve(service, uvicorn.Server(uvicorn_config(service)), bound, on_ready))


def uvicorn_config(service: Service) -> uvicorn.Config:
    """Return the settings of uvicorn: what reaches no application is refused or ended as the rest is."""
    protocol: Any = functools.partial(TimedProtocol, head_s=service.limits.head_s, idle_s=service.limits.idle_s)
    return uvicorn.Config(
        build_app(service),
        http=protocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        server_header=False,
        # The protocol closes idle connections itself, before uvicorn would.
        timeout_keep_alive=1 + round(2 * service.limits.idle_s),
        timeout_graceful_shutdown=_CLOSE_S,
    )


async def _serve(service: Service, server: uvicorn.Server, bound: socket.socket, on_ready: Callable[[], None]) -> None:
    async with service.engine:
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        while not (server.started or serving.done()):
            await asyncio.sleep(0.01)
        # After `serve` has set its own handlers, which would close the socket at once and refuse nobody with a 503.
        async with _gentle_stop(service, server):
            if server.started:
                on_ready()
            await serving


@contextlib.asynccontextmanager
async def _gentle_stop(service: Service, server: uvicorn.Server) -> AsyncIterator[None]:
    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[Any]]()

    async def stop() -> None:
        await service.engine.drain()
        server.should_exit = True

    def hear() -> None:
        if service.is_stopping:
            server.should_exit = server.force_exit = True
            return
        service.is_stopping = True
        tasks.add(asyncio.create_task(stop()))

    signals = (signal.SIGTERM, signal.SIGINT)
    for one in signals:
        loop.add_signal_handler(one, hear)
    try:
        yield
    finally:
        for one in signals:
            loop.remove_signal_handler(one)
        for task in tasks:
            task.cancel()
