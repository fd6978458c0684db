"""Clients that send or read too slowly: they are cut after their time, and nobody waits for them."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from trellax.hub.chat.template import ChatTemplate
from trellax.serve.http import responses
from trellax.serve.http.service import Limits

from .server import LONG, NAME, LetterTokenizer, Server, running, slow_tokens, text_of

TEXT = "/v1/completions"
GOOD = {"model": NAME, "prompt": "Hi", "max_tokens": 2, "temperature": 0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEAD_S, IDLE_S = 0.4, 1.2
PLAIN = ChatTemplate("{{ messages[0].content }}")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(limits=Limits(idle_s=IDLE_S, head_s=HEAD_S, body_s=HEAD_S)) as server:
        yield server


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=20)


def read_all(client: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def send(client: socket.socket, body: Any) -> None:
    content = json.dumps(body).encode()
    client.sendall(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)


def drip(client: socket.socket, content: bytes) -> None:
    """Send a byte every now and then, until the server has closed."""
    with suppress(OSError):
        for byte in content:
            client.send(bytes([byte]))
            time.sleep(HEAD_S / 10)


def check_408(found: bytes, wanted: str) -> None:
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert wanted in json.loads(body)["error"]["message"]


def test_headers_that_drip_are_refused_after_their_time(server: Server) -> None:
    with connect(server) as client:
        threading.Thread(target=drip, args=(client, HEAD), daemon=True).start()
        assert server.ask(TEXT, GOOD)[0] == 200
        check_408(read_all(client), "the headers did not arrive within 0.4 s")


def test_a_body_that_drips_is_refused_after_its_time(server: Server) -> None:
    with connect(server) as client:
        client.sendall(HEAD + b"Content-Length: 99\r\n\r\n")
        threading.Thread(target=drip, args=(client, b" " * 99), daemon=True).start()
        check_408(read_all(client), "the body did not arrive within 0.4 s")


def test_a_connection_that_sends_nothing_is_closed_without_a_word(server: Server) -> None:
    with connect(server) as client:
        assert read_all(client) == b""


def ask(client: socket.socket) -> str:
    """Send a request, and return its status, or "closed" where none came back."""
    send(client, GOOD)
    answer = b""
    while not answer.endswith(b"}"):
        if not (part := client.recv(1 << 16)):
            return "closed"
        answer += part
    return answer.split()[1].decode()


def test_a_client_that_waits_before_it_sends_is_answered(server: Server) -> None:
    # A process that gets no time of a busy machine connects, and sends seconds later.
    with connect(server) as client:
        for _ in range(2):
            time.sleep(1.5 * HEAD_S)
            assert ask(client) == "200"


@pytest.mark.parametrize("first", [b"", HEAD[:9]], ids=["nothing", "a_part"])
def test_a_request_that_arrives_while_the_server_is_late_is_answered(server: Server, first: bytes) -> None:
    with connect(server) as client:
        client.sendall(first)
        assert server.ask("/health")[0] == 200  # so the server has accepted, and read the first part
        server.stall(1.1 * (HEAD_S if first else IDLE_S))
        content = json.dumps(GOOD).encode()
        client.sendall((HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)[len(first) :])
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_what_is_not_http_is_refused_with_a_sentence_after_an_answer_too(server: Server) -> None:
    with connect(server) as client:
        assert ask(client) == "200"
        client.sendall(b"hello\r\n\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 400 ")


def test_the_next_request_of_a_connection_has_its_own_time(server: Server) -> None:
    with connect(server) as client:
        for _ in range(2):
            assert ask(client) == "200"
        threading.Thread(target=drip, args=(client, HEAD), daemon=True).start()
        check_408(read_all(client), "the headers did not arrive")


def test_an_answer_may_take_longer_than_its_headers(server: Server) -> None:
    with slow_tokens():
        start_s = time.monotonic()
        assert server.ask(TEXT, LONG)[0] == 200
        assert time.monotonic() - start_s > HEAD_S
        assert len(server.events(TEXT, LONG)) > 1


def test_requests_sent_at_once_are_answered_one_after_another(server: Server) -> None:
    with slow_tokens(), connect(server) as client:
        for body in (GOOD, LONG):
            send(client, body | {"stream": True})
        found = read_all(client)
    assert found.count(b"HTTP/1.1 200 ") == found.count(b"data: [DONE]") == 2
    assert b" 408 " not in found


@pytest.mark.parametrize("content", [b"\r\n\r\nhello\r\n\r\n", b"GET  HTTP\r\n\r\n", b"\x16\x03\x01" + b"\0" * 64])
def test_what_is_not_http_is_a_400_with_a_sentence(server: Server, content: bytes) -> None:
    with connect(server) as client:
        client.sendall(content)
        head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert "the request is not HTTP" in json.loads(body)["error"]["message"]


def test_headers_without_an_end_are_refused_by_their_length(server: Server) -> None:
    with connect(server) as client, suppress(ConnectionResetError, BrokenPipeError):
        client.sendall(HEAD + b"X: " + b"a" * (1 << 20))
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 400 ")
    assert server.ask(TEXT, GOOD)[0] == 200


def test_a_broken_chunk_of_a_body_is_a_400(server: Server) -> None:
    with connect(server) as client:
        client.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        assert read_all(client).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("is_streaming", [True, False])
def test_client_that_never_reads_is_cut_and_others_get_their_texts(
    monkeypatch: pytest.MonkeyPatch, is_streaming: bool
) -> None:
    monkeypatch.setattr(responses, "_LAST_S", 0.2)
    # Ten letters with twenty log probabilities each, for every choice, are more than all buffers on the way.
    big = LONG | {"prompt": "Hi", "logprobs": 20, "n": 30, "stream": is_streaming}
    with running(limits=Limits(head_s=HEAD_S, answer_s=2.0)) as server:
        server.shrink_buffers()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            send(client, big)
            for _ in range(5):
                status, answer = server.ask(TEXT, GOOD)
                assert (status, answer["choices"][0]["text"]) == (200, text_of("Hi", 2))
            end_s = time.monotonic() + 30
            while server.num_connections():
                assert time.monotonic() < end_s, "the server keeps a client that reads nothing"
                time.sleep(0.02)


class StuckTokenizer(LetterTokenizer):
    """Waits with a text of zeros until it is told to go on."""

    def __init__(self) -> None:
        self.is_stuck, self.may_go_on = threading.Event(), threading.Event()

    def encode(self, text: str) -> list[int]:
        if text.startswith("000"):
            self.is_stuck.set()
            assert self.may_go_on.wait(30)
        return super().encode(text)

    encode_prompt = encode


@pytest.mark.parametrize("path", [TEXT, "/v1/chat/completions"])
def test_nobody_waits_for_a_long_prompt_to_be_encoded(path: str) -> None:
    tokenizer = StuckTokenizer()
    prompt = {"prompt": "000"} if path == TEXT else {"messages": [{"role": "user", "content": "000"}]}
    with running(tokenizer=tokenizer, template=None if path == TEXT else PLAIN) as server:
        found: list[Any] = []
        body = {"model": NAME, "max_tokens": 2, **prompt}
        asking = threading.Thread(target=lambda: found.append(server.ask(path, body)))
        asking.start()
        assert tokenizer.is_stuck.wait(30)
        assert server.ask("/health")[0] == 200
        assert server.ask(TEXT, GOOD)[1]["choices"][0]["text"] == text_of("Hi", 2)
        assert found == []
        tokenizer.may_go_on.set()
        asking.join(30)
        assert found[0][0] == 200


def test_a_server_that_begins_to_stop_while_a_prompt_is_encoded_refuses_it() -> None:
    tokenizer = StuckTokenizer()
    with running(tokenizer=tokenizer) as server:
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(server.ask(TEXT, GOOD | {"prompt": "000"})))
        asking.start()
        assert tokenizer.is_stuck.wait(30)
        server.service.is_stopping = True
        tokenizer.may_go_on.set()
        asking.join(30)
        assert found[0][0] == 503
