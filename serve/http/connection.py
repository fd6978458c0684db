"""Work for a client as long as it listens."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T], *, timeout_s: float | None) -> T:
    """Return what `work` returns; cancel it when the client leaves or the time is over.

    Raises:
        ClientDisconnect: the client has left.
        TimeoutError: the work took longer than `timeout_s`.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        done, _ = await asyncio.wait([worker, watcher], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if worker in done:
            return worker.result()
        raise ClientDisconnect if done else TimeoutError
    finally:
        for task in (worker, watcher):
            task.cancel()
        # Until both have ended: the work may have more to clean up.
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
