"""Any value in any field, and any bytes on the wire, get a 4xx with a sentence in OpenAI's shape, and soon."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from trellax.hub.chat.template import ChatTemplate
from trellax.serve.http import protocol
from trellax.serve.http.protocol import ChatRequest, CompletionRequest, Message
from trellax.serve.http.service import Limits, Service

from .server import NAME, Server, running

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"model": NAME, "prompt": "Hi", "max_tokens": 1}
CHAT_GOOD = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
ODD: list[Any] = [True, -1, 0, 1.5, 10**400, 1e308, "", "x", "\0", "a" * 2000, [], [None], [[[]]], {}, {"a": {"b": []}}]
UNSUPPORTED = set(protocol._DEFAULTS)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(limits=Limits(choices=4)) as server:
        yield server


def check_refusal(status: int, answer: Any, *, text: str = "") -> None:
    assert 400 <= status < 500, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    message = answer["error"]["message"]
    assert text in message
    assert len(message) < 2_500
    assert not {"Traceback", "Error:", 'File "'} & set(message.split())


def check_either(server: Server, path: str, body: Any) -> int:
    """An answer or a refusal, and nothing else."""
    status, answer = server.ask(path, body)
    if status != 200:
        check_refusal(status, answer)
    return status


@pytest.mark.parametrize("name", sorted({*CompletionRequest.model_fields, *UNSUPPORTED}))
def test_odd_values_in_any_field_of_a_completion(server: Server, name: str) -> None:
    assert 400 in {check_either(server, TEXT, GOOD | {name: value}) for value in ODD}


@pytest.mark.parametrize("name", sorted({*ChatRequest.model_fields, *UNSUPPORTED}))
def test_odd_values_in_any_field_of_a_chat(server: Server, name: str) -> None:
    assert 400 in {check_either(server, CHAT, CHAT_GOOD | {name: value}) for value in ODD}


@pytest.mark.parametrize("name", sorted({*Message.model_fields, "unknown"}))
def test_odd_values_in_any_field_of_a_message(server: Server, name: str) -> None:
    messages = [{"role": "user", "content": "Hi"} | {name: value} for value in ODD]
    assert 400 in {check_either(server, CHAT, CHAT_GOOD | {"messages": [message]}) for message in messages}


BIG: list[tuple[str, Any, str]] = [
    (TEXT, GOOD | {"prompt": [1.5] * 200_000}, "prompt="),
    (TEXT, GOOD | {"prompt": [[]] * 200_000}, "prompt="),
    (TEXT, GOOD | {"prompt": ["a"] * 1_000}, "prompts x n are 1000 answers"),
    (TEXT, GOOD | {"prompt": "a" * 1_000_000}, "a prompt of 1000000 tokens"),
    (TEXT, GOOD | {"prompt": [1] * 1_000_000}, "a prompt of 1000000 tokens"),
    (TEXT, GOOD | {"stop": ["a"] * 200_000}, "stop="),
    (TEXT, GOOD | {str(index): 1 for index in range(100_000)}, "the body has 100003 fields"),
    (CHAT, CHAT_GOOD | {"messages": [{}] * 200_000}, "messages.0.role"),
    (CHAT, CHAT_GOOD | {"messages": [{"role": "user", "content": [{}] * 200_000}]}, "messages="),
    (CHAT, CHAT_GOOD | {"messages": [{"role": "user", "content": "a"}] * 20_000}, "a prompt of"),
    (CHAT, CHAT_GOOD | {"tools": [{}] * 200_000}, "tools="),
    (TEXT, b'{"model":' * 200_000, "the body is not JSON"),
    (TEXT, b'{"prompt":' + b"[" * 1_000_000, "the body is not JSON"),
    (TEXT, b'{"seed":' + b"9" * 1_000_000 + b"}", ""),
    (TEXT, b" " * 1_000_000, "the body is not JSON"),
]


@pytest.mark.parametrize(("path", "body", "text"), BIG)
def test_a_big_body_is_refused_with_a_short_sentence(server: Server, path: str, body: Any, text: str) -> None:
    check_refusal(*server.ask(path, body), text=text)
    assert server.gauge("answers_open") == 0


HEADS = [
    b"GET /v1/models\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1e9\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: odd\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json; charset=\xff\xfe\r\n\r\n",
    b"GET /v1/models/%00%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"BREW /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("content", HEADS, ids=range(len(HEADS)))
def test_an_odd_head_is_refused_with_a_sentence(server: Server, content: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client, suppress(ConnectionResetError):
        client.sendall(content)
        found = client.recv(1 << 16)
        while b"\r\n\r\n" not in found or found.endswith(b"\r\n\r\n"):
            part = client.recv(1 << 16)
            assert part, found
            found += part
        status, body = int(found.split()[1]), found.partition(b"\r\n\r\n")[2]
        # Some are two requests, whose second answer may be there already.
        check_refusal(status, json.JSONDecoder().raw_decode(body.decode())[0])


def test_a_mistake_of_the_server_is_a_500_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(Service, "complete", fail)
    with running() as server:
        status, answer = server.ask(TEXT, GOOD)
    assert status == 500
    assert answer["error"] | {"message": ""} == {"message": "", "type": "server_error", "param": None, "code": None}
    assert "secret" not in answer["error"]["message"]


@pytest.mark.parametrize(
    "source", ["{{ messages[9].content }}", "{{ [] | first + 1 }}", "{% include 'a' %}", "{{ 1 % 0 }}"]
)
def test_a_bad_template_is_a_400_and_others_are_answered(source: str) -> None:
    with running(template=ChatTemplate(source)) as server:
        status, answer = server.ask(CHAT, CHAT_GOOD)
        check_refusal(status, answer, text="the model's chat template does not take these messages")
        assert server.ask(TEXT, GOOD)[0] == 200
