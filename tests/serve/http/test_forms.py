"""Answers that keep to a form, by the fields of OpenAI's API and of vLLM's clients; the model has few letters."""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from trellax.serve import async_engine

from .server import NAME, Server, running, shared_engine, text_of

pytest.importorskip("llguidance", reason="needs the extra constrain")

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
BODY: dict[str, Any] = {"model": NAME, "temperature": 1, "seed": 3, "max_tokens": 12}
ASKS: dict[str, dict[str, Any]] = {TEXT: {"prompt": "Hi"}, CHAT: {"messages": [{"role": "user", "content": "Hi"}]}}
NUMBER = {"type": "integer", "minimum": 100, "maximum": 999}
AS_SCHEMA = {"type": "json_schema", "json_schema": {"name": "number", "strict": True, "schema": NUMBER}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def text_in(path: str, choice: dict[str, Any]) -> str:
    return choice["text"] if path == TEXT else choice["message"]["content"]


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": AS_SCHEMA}, "[1-9][0-9]{2}"),
        ({"structured_outputs": {"json": NUMBER}}, "[1-9][0-9]{2}"),
        ({"structured_outputs": {"regex": "[a-c]{4}"}}, "[a-c]{4}"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"guided_json": json.dumps(NUMBER)}, "[1-9][0-9]{2}"),
        ({"guided_regex": "a[0-9]b"}, "a[0-9]b"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_every_field_of_a_form_is_kept_to(server: Server, path: str, fields: dict[str, Any], pattern: str) -> None:
    status, answer = server.ask(path, BODY | ASKS[path] | fields | {"n": 2})
    assert status == 200, answer
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, text_in(path, choice))
        assert choice["finish_reason"] == "stop"


def test_a_form_of_any_text_changes_nothing(server: Server) -> None:
    body = BODY | ASKS[TEXT] | {"temperature": 0, "response_format": {"type": "text"}, "structured_outputs": None}
    assert server.ask(TEXT, body)[1]["choices"][0]["text"] == text_of("Hi", 12)


def test_a_stream_is_the_whole_answer(server: Server) -> None:
    body = BODY | ASKS[TEXT] | {"guided_regex": "[A-Z]{5}[a-z]{5}"}
    parts = [event["choices"][0] for event in server.events(TEXT, body)]
    assert "".join(part["text"] for part in parts) == server.ask(TEXT, body)[1]["choices"][0]["text"]
    assert parts[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "told", "param"),
    [
        ({"response_format": {"type": "yaml"}}, "json_object", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "has no schema", "response_format"),
        ({"response_format": {"type": "json_object"}}, "no token of this model", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "odd"}}}},
            "the JSON schema is not supported: Invalid type: odd",
            "response_format",
        ),
        ({"guided_regex": "("}, "unclosed group", "guided_regex"),
        ({"guided_regex": ""}, "'' is not a regular expression", "guided_regex"),
        ({"guided_choice": []}, "guided_choice=[]", "guided_choice"),
        ({"guided_choice": ["a", ""]}, "is no choice", "guided_choice"),
        ({"guided_json": "{"}, "the JSON schema is not JSON", "guided_json"),
        ({"guided_json": {"enum": ["a" * 200_000]}}, "at most 131,072 are compiled", "guided_json"),
        ({"structured_outputs": {"grammar": "root ::= a"}}, "'structured_outputs.grammar' is an unknown field", None),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "each ask for a form of the answer", "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json": True}}, "each ask for a form", "structured_outputs"),
    ],
    ids=str,
)
def test_a_wrong_form_is_a_400_with_a_sentence(
    server: Server, fields: dict[str, Any], told: str, param: str | None
) -> None:
    status, answer = server.ask(TEXT, BODY | ASKS[TEXT] | fields)
    assert status == 400
    error = answer["error"]
    assert told in error["message"]
    assert "Fix: " in error["message"]
    assert param in (None, error["param"])
    assert server.service.engine.num_open == 0


def test_a_form_that_compiles_for_long_is_refused_and_holds_nobody_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = shared_engine().constraints
    compile_, is_begun = constraints.compile, threading.Event()

    def compile_slowly(constraint: Any) -> Any:
        if constraint.text == "slow":
            is_begun.set()
            time.sleep(1.5)
        return compile_(constraint)

    monkeypatch.setattr(constraints, "compile", compile_slowly)
    monkeypatch.setattr(async_engine, "COMPILE_S", 0.3)
    found: list[tuple[int, Any]] = []
    asking = threading.Thread(
        target=lambda: found.append(server.ask(TEXT, BODY | ASKS[TEXT] | {"guided_regex": "slow"}))
    )
    asking.start()
    assert is_begun.wait(20)
    start_s = time.monotonic()
    assert server.ask(TEXT, BODY | ASKS[TEXT])[0] == 200
    assert time.monotonic() - start_s < 1.2
    asking.join(20)
    assert found[0][0] == 400
    assert "did not compile within 0.3 s" in found[0][1]["error"]["message"]
