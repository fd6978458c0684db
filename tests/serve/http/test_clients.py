"""Clients that leave, wait or come by the hundred: slots come back, memory stays, nobody waits for another."""

import gc
import json
import random
import resource
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from trellax.programs import compilations

from .server import LONG, NAME, Server, running, slow_tokens, text_of

TEXT = "/v1/completions"
GOOD = {"model": NAME, "prompt": "Hi", "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def leave(server: Server, *, is_streaming: bool) -> None:
    """Begin a long answer, and close the connection while it runs."""
    with begin(server, is_streaming=is_streaming) as client:
        if is_streaming:
            assert client.recv(1 << 16)


def begin(server: Server, *, is_streaming: bool) -> socket.socket:
    """Send a request for a long answer."""
    content = json.dumps(LONG | {"stream": is_streaming}).encode()
    head = (
        f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    client = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    client.sendall(head.encode() + content)
    return client


@pytest.mark.parametrize("is_streaming", [True, False])
def test_client_that_leaves_frees_its_slot(is_streaming: bool) -> None:
    with slow_tokens(), running() as server:
        for _ in range(4):
            leave(server, is_streaming=is_streaming)
        # A server that has not read a request yet is idle too.
        end_s = time.monotonic() + 30
        while server.service.metrics.answers.total() < 4:
            assert time.monotonic() < end_s, "a request is neither answered nor cancelled"
            time.sleep(0.01)
        server.wait_until_idle()
        assert server.service.metrics.answers == {"cancelled": 4}
        assert server.ask(TEXT, GOOD)[0] == 200


def test_client_that_does_not_read_delays_nobody(server: Server) -> None:
    with begin(server, is_streaming=True):
        for _ in range(5):
            assert server.ask(TEXT, GOOD)[0] == 200
    server.wait_until_idle()


def soak(server: Server, num_requests: int) -> None:
    """Send requests of mixed lengths one after another, three of four at once, a tenth of which leave."""
    lengths = [(1 + index % 3, 1 + index % 5) for index in range(15)]
    texts = {(prompt, new): text_of("Hello"[:prompt], new) for prompt, new in lengths}

    def ask(index: int) -> bool:
        if random.Random(index).random() < 0.1:
            leave(server, is_streaming=index % 2 == 0)
            return True
        prompt, new = lengths[index % len(lengths)]
        body = GOOD | {"prompt": "Hello"[:prompt], "max_tokens": new, "temperature": 0}
        if index % 2:
            found = "".join(event["choices"][0]["text"] for event in server.events(TEXT, body))
        else:
            found = server.ask(TEXT, body)[1]["choices"][0]["text"]
        return found == texts[prompt, new]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(num_requests)))
    server.wait_until_idle()


def test_no_slot_leaks_over_many_requests(server: Server) -> None:
    soak(server, 200)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_slot_and_no_memory_leaks_over_ten_thousand_requests(server: Server) -> None:
    # Resident memory made one step of 10 MiB between 5,000 and 15,000 requests, then grew by 0.2 MiB in each 10,000.
    soak(server, 15_000)
    before_bytes, before_objects = measure_memory()
    with compilations() as compiled:
        soak(server, 10_000)
    assert compiled == []
    after_bytes, after_objects = measure_memory()
    assert after_objects - before_objects < 1_000
    assert after_bytes - before_bytes < 2 << 20


def measure_memory() -> tuple[int, int]:
    """Return the resident bytes of this process, and the number of its objects that refer to others."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(), len(gc.get_objects())
