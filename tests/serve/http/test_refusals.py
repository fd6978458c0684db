"""Wrong requests get a 4xx with a sentence in OpenAI's shape, never a traceback, and hold no slot."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trellax.hub.chat.template import ChatTemplate
from trellax.meshes import ServeError
from trellax.serve.http.service import Limits

from .server import LONG, NAME, Server, running, slow_tokens

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GOOD = {"model": NAME, "prompt": "Hi", "max_tokens": 2}
CHAT_GOOD = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(limits=Limits(body_bytes=10_000, body_s=0.5, choices=6)) as server:
        yield server


WRONG: list[tuple[str, Any, int, str]] = [
    (TEXT, b"", 400, "the body is not JSON"),
    (TEXT, b'{"model":', 400, "the body is not JSON"),
    (TEXT, b"\xff\xfe", 400, "the body is not JSON"),
    (TEXT, b"[" * 5_000, 400, "the body is not JSON"),
    (TEXT, b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "the body is not JSON"),
    (TEXT, b'{"model": "tiny", "prompt": "\\ud800"}', 400, "the body is not JSON"),
    (TEXT, [1, 2], 400, "the body is a list, not a JSON object"),
    (TEXT, {}, 400, "the field 'model' is missing"),
    (TEXT, {"model": NAME}, 400, "the field 'prompt' is missing"),
    (TEXT, GOOD | {"model": "gpt"}, 404, "there is no model 'gpt' here; this server has 'tiny'"),
    (TEXT, GOOD | {"prompt": {}}, 400, "prompt={}"),
    (TEXT, GOOD | {"prompt": []}, 400, "there is no prompt"),
    (TEXT, GOOD | {"prompt": [[]]}, 400, "a prompt is empty"),
    (TEXT, GOOD | {"prompt": [64]}, 400, "token id 64 is not in the vocabulary of 64"),
    (TEXT, GOOD | {"prompt": "a!"}, 400, "there is no token for '!'"),
    (TEXT, GOOD | {"prompt": "a" * 95}, 400, "a prompt of 95 tokens and max_tokens=2 are 97 tokens"),
    (TEXT, GOOD | {"prompt": "a" * 20_000}, 413, "the body has more than 10000 bytes"),
    (TEXT, GOOD | {"max_tokens": 0}, 400, "max_tokens=0"),
    (TEXT, GOOD | {"max_tokens": "2"}, 400, "max_tokens='2'"),
    (TEXT, GOOD | {"max_tokens": 10**30}, 400, "max_tokens="),
    (TEXT, GOOD | {"temperature": 2.5}, 400, "temperature=2.5"),
    (TEXT, GOOD | {"top_p": -0.1}, 400, "top_p=-0.1"),
    (TEXT, GOOD | {"top_k": -2}, 400, "top_k=-2"),
    (TEXT, GOOD | {"n": True}, 400, "n=True"),
    (TEXT, GOOD | {"n": 7}, 400, "prompts x n are 7 answers"),
    (TEXT, GOOD | {"stop": ""}, 400, "a stop string is empty"),
    (TEXT, GOOD | {"stop": ["a"] * 17}, 400, "17 stop strings, at most 16 are taken"),
    (TEXT, GOOD | {"logprobs": 21}, 400, "logprobs=21"),
    (TEXT, GOOD | {"logprobs": True}, 400, "logprobs=True"),
    (TEXT, GOOD | {"best_of": 3}, 400, "best_of=3 is not supported by this server"),
    (TEXT, GOOD | {"presence_penalty": 2.5}, 400, "presence_penalty=2.5"),
    (TEXT, GOOD | {"repetition_penalty": 0}, 400, "repetition_penalty=0"),
    (TEXT, GOOD | {"logit_bias": {"a": 1}}, 400, "'a' is no token id"),
    (TEXT, GOOD | {"logit_bias": {"64": 1}}, 400, "token id 64 is not in the vocabulary of 64"),
    (TEXT, GOOD | {"logit_bias": {"6": 101}}, 400, "logit_bias=101"),
    (CHAT, CHAT_GOOD | {"top_logprobs": 2}, 400, "top_logprobs needs logprobs to be true"),
    (TEXT, GOOD | {"echo": True}, 400, "echo=True is not supported"),
    (TEXT, GOOD | {"temprature": 1}, 400, "'temprature' is an unknown field"),
    (TEXT, GOOD | {"stream_options": {"x": 1}}, 400, "'stream_options.x' is an unknown field"),
    (CHAT, CHAT_GOOD | {"messages": []}, 400, "messages=[]"),
    (CHAT, CHAT_GOOD | {"messages": [{"role": "king", "content": "Hi"}]}, 400, "messages='king'"),
    (CHAT, CHAT_GOOD | {"messages": [{"role": "user", "content": None}]}, 400, "messages=None"),
    (CHAT, CHAT_GOOD | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages="),
    (CHAT, CHAT_GOOD | {"tools": [{"type": "function"}]}, 400, "is not supported by this server"),
    ("/v1/nothing", GOOD, 404, "there is no such path"),
    ("/v1/models", GOOD, 405, "this path takes no POST"),
    ("/v1/models/gpt", None, 404, "there is no such model here"),
    (TEXT, None, 405, "this path takes no GET"),
]


def check_refusal(answer: Any, wanted: str) -> None:
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert wanted in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize(("path", "body", "status", "wanted"), WRONG)
def test_wrong_request_is_refused_with_a_sentence(
    server: Server, path: str, body: Any, status: int, wanted: str
) -> None:
    found, answer = server.ask(path, body)
    assert found == status, answer
    check_refusal(answer, wanted)
    assert server.gauge("answers_open") == 0


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = sorted([*GOOD, *CHAT_GOOD, "n", "stop", "seed", "temperature", "top_p", "top_k", "stream_options", "logprobs"])
NAMES += ["top_logprobs", "logit_bias", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from([TEXT, CHAT]), name=st.sampled_from(NAMES), value=json_values, cut=st.none() | st.integers(1)
)
def test_any_value_of_any_field_is_answered_or_refused(
    server: Server, path: str, name: str, value: Any, cut: int | None
) -> None:
    body = json.dumps((GOOD if path == TEXT else CHAT_GOOD) | {name: value}).encode()
    body = body if cut is None else body[: cut % len(body)]
    status, answer = server.ask(path, body)
    assert status in {200, 400, 404}
    if status != 200:
        check_refusal(answer, "")


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=80))
def test_any_bytes_are_refused(server: Server, content: bytes) -> None:
    status, answer = server.ask(TEXT, content)
    assert status == 400
    check_refusal(answer, "")


def test_body_of_another_type_is_refused(server: Server) -> None:
    status, answer = server.ask(TEXT, GOOD, headers={"Content-Type": "text/plain"})
    assert status == 415
    check_refusal(answer, "the body is of type text/plain, not application/json")


def test_slow_body_is_refused_after_its_time(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert server.ask("/health")[0] == 200
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408 ")


def test_endless_body_is_refused_before_its_end(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as endless:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        endless.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"a" * 4096 + b"\r\n")
        endless.sendall(b"4000\r\n" + b"a" * 16384 + b"\r\n")
        assert endless.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_answers_past_the_queue_are_429_and_none_of_their_choices_begins() -> None:
    with slow_tokens(), running(max_waiting=1) as server:
        streams = [server.open(TEXT, LONG | {"stream": True}) for _ in range(2)]
        status, answer = server.ask(TEXT, LONG | {"n": 3})
        assert status == 429
        check_refusal(answer, "the server is busy: 2 answers are in progress or in the queue, and 3 more have no place")
        assert answer["error"]["type"] == "rate_limit_error"
        for stream in streams:
            stream.read()
        assert server.ask(TEXT, GOOD)[0] == 200


def test_answer_that_takes_too_long_is_cancelled() -> None:
    with running(limits=Limits(answer_s=1e-4)) as server:
        status, answer = server.ask(TEXT, LONG)
        assert status == 504
        check_refusal(answer, "the answer did not end within 0.0001 s")
        events = server.open(TEXT, LONG | {"stream": True}).read().decode()
        assert "the answer did not end within 0.0001 s" in events
        assert "[DONE]" not in events


def test_api_key_guards_all_but_page_and_health() -> None:
    with running(api_key="secret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path, body in ((TEXT, GOOD), ("/v1/models", None), ("/metrics", None), ("/v1/nothing", None)):
                status, answer = server.ask(path, body, headers=headers)
                assert status == 401
                check_refusal(answer, "the API key is missing or wrong")
        assert server.ask(TEXT, GOOD, headers={"Authorization": "Bearer secret"})[0] == 200
        assert [server.ask(path)[0] for path in ("/", "/health")] == [200, 200]


def test_a_stopping_server_refuses_new_requests() -> None:
    with running() as server:
        server.service.is_stopping = True
        status, answer = server.ask(TEXT, GOOD)
        assert status == 503
        check_refusal(answer, "the server is stopping")
        assert server.ask("/health") == (503, {"status": "stopping"})


def test_model_without_a_template_refuses_chats_alone() -> None:
    with running(template=None) as server:
        status, answer = server.ask(CHAT, CHAT_GOOD)
        assert status == 400
        check_refusal(answer, "the model tiny has no chat template")
        assert server.ask(TEXT, GOOD)[0] == 200


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ raise_exception('user first') }}", "user first"),
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "it takes too long"),
        ("{{ missing.field }}", "undefined"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
    ],
)
def test_template_that_fails_is_a_400(source: str, wanted: str) -> None:
    with running(template=ChatTemplate(source, max_seconds=0.2)) as server:
        status, answer = server.ask(CHAT, CHAT_GOOD)
        assert status == 400
        check_refusal(answer, "the model's chat template does not take these messages: ")
        assert wanted in answer["error"]["message"]
        assert server.ask(TEXT, GOOD)[0] == 200


@pytest.mark.parametrize("wrong", [{"body_bytes": 0}, {"choices": 1.5}, {"answer_s": 0.0}, {"body_s": float("nan")}])
def test_limits_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ServeError, match=next(iter(wrong))):
        Limits(**wrong)
