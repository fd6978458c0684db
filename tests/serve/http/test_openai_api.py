"""Answers have the fields of OpenAI's API, no fewer, no more, and of its types: openai_api.toml has both sides."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .server import Server, running

API = tomllib.loads(Path(__file__).with_name("openai_api.toml").read_text(encoding="utf-8"))
SETTINGS = {"base", "path", "shape", "status"}
CASES = [
    pytest.param({**group, **case}, id=f"{kind}-{name}")
    for kind, group in API["requests"].items()
    for name, case in group.items()
    if name not in SETTINGS
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def problems(value: Any, shape: Any, where: str = "answer") -> list[str]:
    """Return what is wrong with a value."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        names = {name.removesuffix("?"): name for name in shape}
        missing = [f"{where}.{name} is missing" for name in shape if not name.endswith("?") and name not in value]
        unknown = [f"{where}.{name} is not in the API" for name in value if name not in names]
        known = [name for name in value if name in names]
        return (
            missing + unknown + [p for one in known for p in problems(value[one], shape[names[one]], f"{where}.{one}")]
        )
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [p for index, one in enumerate(value) for p in problems(one, shape[0], f"{where}.{index}")]
    found = [_problems_of_kind(value, kind, where) for kind in shape.split("|")]
    return min(found, key=len)


def _problems_of_kind(value: Any, kind: str, where: str) -> list[str]:
    if kind.startswith("@"):
        return problems(value, API["shapes"][kind[1:]], where)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "int": is_number and isinstance(value, int),
        "number": is_number,
        "text": isinstance(value, str),
        "null": value is None,
        "map": isinstance(value, dict) and not any(problems(one, "number") for one in value.values()),
    }
    is_right = value == kind[1:] if kind.startswith("=") else fits[kind]
    return [] if is_right else [f"{where}={value!r} is not {kind}"]


def filled(value: Any) -> Any:
    """TOML has no null: texts stand for it, and for a field that is left out."""
    if isinstance(value, dict):
        return {name: filled(one) for name, one in value.items() if one != "left out"}
    return [filled(one) for one in value] if isinstance(value, list) else None if value == "null" else value


def value_at(answer: Any, path: str) -> Any:
    for name in path.split("."):
        answer = answer[int(name)] if isinstance(answer, list) else answer[name]
    return "null" if answer is None else answer


def check_values(answer: Any, values: dict[str, Any]) -> None:
    assert {path: value_at(answer, path) for path in values} == values


@pytest.mark.parametrize("case", CASES)
def test_answer_has_the_shape_of_the_api(server: Server, case: dict[str, Any]) -> None:
    body = None if case.get("base", "left out") == "left out" else filled(case["base"] | case.get("body", {}))
    path = case.get("path", "/v1/completions")
    if body and body.get("stream"):
        events = server.events(path, body)
        assert [p for event in events for p in problems(event, API["shapes"][case["shape"]])] == []
        check_stream(events, body, case)
        return
    for _ in range(case.get("asks", 1) - 1):
        server.ask(path, body)
    status, answer = server.ask(path, body)
    assert status == case.get("status", 200), answer
    assert problems(answer, API["shapes"][case["shape"]]) == []
    check_values(answer, case.get("values", {}))


def check_stream(events: list[Any], body: dict[str, Any], case: dict[str, Any]) -> None:
    """What the reference says of the order of events, and of what they have in common."""
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    if body.get("stream_options", {}).get("include_usage"):
        *events, last = events
        assert last["choices"] == []
        check_values(last["usage"], case.get("usage", {}))
        assert {event["usage"] for event in events} == {None}
    else:
        assert not any("usage" in event for event in events)
    check_values(events[-1], case.get("values", {}))
    text = "AAAA"[: 0 if "stop" in body else 4]
    for index in range(body.get("n", 1)):
        own = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert [choice["finish_reason"] is None for choice in own] == [True] * (len(own) - 1) + [False]
        if "messages" in body:
            assert own[0]["delta"] == {"role": "assistant", "content": ""}
            assert own[-1]["delta"] == {}
        parts = [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in own]
        assert "".join(parts) == text


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"id": "tiny", "object": "model", "created": 1, "owned_by": "me"}, []),
        ({"id": "tiny", "object": "list", "created": True, "root": 1}, 4),
        ([], ["answer is no object"]),
    ],
)
def test_shapes_find_what_is_wrong(value: Any, wanted: Any) -> None:
    found = problems(value, API["shapes"]["model"])
    assert found == wanted if isinstance(wanted, list) else len(found) == wanted


def test_headers_are_those_of_the_api(server: Server) -> None:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
    plain, stream = (server.open("/v1/completions", body | {"stream": is_stream}) for is_stream in (False, True))
    refused = server.open("/v1/completions", body | {"n": 0})
    kinds = [response.headers.get_content_type() for response in (plain, stream, refused)]
    assert kinds == ["application/json", "text/event-stream", "application/json"]
    ids = {response.headers["x-request-id"] for response in (plain, stream, refused)}
    assert len(ids) == 3
    assert all(one.startswith("req_") for one in ids)
    assert stream.headers["cache-control"] == "no-cache"
    for response in (plain, stream, refused):
        response.read()


def test_a_missing_key_is_refused_with_the_type_of_the_api() -> None:
    with running(api_key="secret") as server:
        status, answer = server.ask("/v1/models")
        assert status == 401
        assert problems(answer, API["shapes"]["error"]) == []
        check_values(answer, {"error.type": "invalid_request_error", "error.code": "invalid_api_key"})
