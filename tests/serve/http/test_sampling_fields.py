"""Penalties, biases and log probabilities over HTTP, by the names and in the shapes of OpenAI's API."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from ..models import logits_of
from .server import CONFIG, LETTERS, NAME, LetterTokenizer, Server, running, text_of

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 6}
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 1.5, "frequency_penalty": 1},
        {"repetition_penalty": 1.6},
        {"logit_bias": {"7": 100}},
        {"temperature": 1.5, "seed": 3, "min_p": 0.3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_of_sampling_reach_the_engine(server: Server, fields: dict[str, Any]) -> None:
    how = fields | {"logit_bias": [(int(token), bias) for token, bias in fields.get("logit_bias", {}).items()]}
    status, answer = server.ask(TEXT, BODY | fields | {"prompt": "Hello", "max_tokens": 12})
    assert status == 200, answer
    assert answer["choices"][0]["text"] == text_of("Hello", 12, how=how)
    assert answer["choices"][0]["text"] != text_of("Hello", 12)


def expected_of(prompt: str, text: str, count: int) -> list[tuple[str, float, dict[str, float]]]:
    """Each letter of an answer, its log probability, and those of the likeliest letters."""
    ids = LetterTokenizer().encode(prompt + text)
    logits_TV = logits_of(CONFIG, np.asarray([ids]))[0, len(prompt) - 1 : -1].astype(np.float64)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    found = []
    for letter, values_V in zip(text, logprobs_TV, strict=True):
        top = np.argsort(-values_V)[:count]
        found.append((letter, values_V[LETTERS.index(letter)], {LETTERS[one]: values_V[one] for one in top}))
    return found


def test_a_completion_has_log_probabilities_and_offsets(server: Server) -> None:
    _, answer = server.ask(TEXT, BODY | {"prompt": "Hello", "logprobs": 2, "presence_penalty": 1})
    choice, expected = answer["choices"][0], expected_of("Hello", answer["choices"][0]["text"], 2)
    found = choice["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert found["tokens"] == list(choice["text"])
    assert found["token_logprobs"] == pytest.approx([value for _, value, _ in expected], abs=1e-4)
    assert found["text_offset"] == list(range(6))
    for top, (letter, value, wanted) in zip(found["top_logprobs"], expected, strict=True):
        # Also the chosen one, which a penalty may have made another than the likeliest.
        assert top == pytest.approx(wanted | {letter: value}, abs=1e-4)


def test_a_chat_has_log_probabilities_and_bytes(server: Server) -> None:
    _, answer = server.ask(CHAT, BODY | {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3})
    choice = answer["choices"][0]
    expected = expected_of("u Hi a ", choice["message"]["content"], 3)
    assert set(choice["logprobs"]) == {"content", "refusal"}
    for one, (letter, value, top) in zip(choice["logprobs"]["content"], expected, strict=True):
        assert (one["token"], one["bytes"]) == (letter, list(letter.encode()))
        assert one["logprob"] == pytest.approx(value, abs=1e-4)
        assert {entry["token"]: entry["logprob"] for entry in one["top_logprobs"]} == pytest.approx(top, abs=1e-4)


def test_without_top_logprobs_a_chat_has_those_of_its_tokens(server: Server) -> None:
    _, answer = server.ask(CHAT, BODY | {"messages": MESSAGES, "logprobs": True})
    content = answer["choices"][0]["logprobs"]["content"]
    assert [one["top_logprobs"] for one in content] == [[]] * 6


@pytest.mark.parametrize("path", [TEXT, CHAT])
def test_a_stream_has_the_log_probabilities_of_the_whole(server: Server, path: str) -> None:
    asked = {"logprobs": 2, "prompt": "Hello"} if path == TEXT else {"logprobs": True, "messages": MESSAGES}
    _, whole = server.ask(path, BODY | asked)
    expected = whole["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in server.events(path, BODY | asked)]
    joined = {
        name: [one for part in parts if part for one in part[name]] for name in expected if expected[name] is not None
    }
    assert joined == {name: value for name, value in expected.items() if value is not None}


def test_a_stop_string_takes_its_log_probabilities_with_it(server: Server) -> None:
    whole = text_of("Hello", 20)
    body = BODY | {"prompt": "Hello", "max_tokens": 20, "stop": whole[5:8], "logprobs": 0}
    _, answer = server.ask(TEXT, body)
    choice = answer["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"] == whole[: whole.index(whole[5:8])]
    assert json.dumps(choice["logprobs"]["top_logprobs"][0]).count(":") == 1
