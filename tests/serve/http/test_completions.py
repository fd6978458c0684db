"""Answers over HTTP are those of the engine: plain, streaming, chats, several at once, and with stop strings."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from trellax.programs import compilations
from trellax.serve import AsyncEngine, Engine, Speculation

from ..models import mesh_of, params_on
from .server import CONFIG, NAME, Server, running, text_of

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY: dict[str, Any] = {"model": NAME, "temperature": 0}
MESSAGES = [{"role": "system", "content": "Be"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
CHAT_PROMPT = "s Be u Hi a "
NONE_CACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as server:
        yield server


def test_completion_is_the_greedy_text_with_usage(server: Server) -> None:
    status, answer = server.ask(TEXT, GREEDY | {"prompt": "Hello", "max_tokens": 9})
    assert status == 200
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "object": "text_completion",
        "model": NAME,
        "choices": [{"index": 0, "text": text_of("Hello", 9), "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14} | NONE_CACHED,
    }


def test_chat_is_the_greedy_text_after_the_template(server: Server) -> None:
    status, answer = server.ask(CHAT, GREEDY | {"messages": MESSAGES, "max_completion_tokens": 7})
    assert (status, answer["object"]) == (200, "chat.completion")
    message = {"role": "assistant", "content": text_of(CHAT_PROMPT, 7), "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"]["prompt_tokens"] == len(CHAT_PROMPT)


def test_chat_without_a_limit_uses_the_room_that_is_left(server: Server) -> None:
    _, answer = server.ask(CHAT, GREEDY | {"messages": MESSAGES})
    assert answer["usage"]["total_tokens"] == 96


def test_streaming_completion_is_the_same_text(server: Server) -> None:
    events = server.events(TEXT, GREEDY | {"prompt": "Hello", "max_tokens": 9})
    assert "".join(event["choices"][0]["text"] for event in events) == text_of("Hello", 9)
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * (len(events) - 1) + ["length"]
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_streaming_chat_begins_with_the_role_and_ends_with_usage(server: Server) -> None:
    body = GREEDY | {"messages": MESSAGES, "max_tokens": 7, "stream_options": {"include_usage": True}}
    first, *events, last = server.events(CHAT, body)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    assert text == text_of(CHAT_PROMPT, 7)
    assert events[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert {event["usage"] for event in (first, *events)} == {None}
    size = len(CHAT_PROMPT)
    usage = {"prompt_tokens": size, "completion_tokens": 7, "total_tokens": size + 7} | NONE_CACHED
    assert (last["choices"], last["usage"]) == ([], usage)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("is_streaming", [False, True])
def test_stop_string_of_several_tokens_ends_the_answer_before_it(
    server: Server, first: int, is_streaming: bool
) -> None:
    whole = text_of("Hello", 20)
    stop = whole[first : first + 3]
    body = GREEDY | {"prompt": "Hello", "max_tokens": 20, "stop": [stop, "never there"]}
    if is_streaming:
        events = server.events(TEXT, body)
        text = "".join(event["choices"][0]["text"] for event in events)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        choice = server.ask(TEXT, body)[1]["choices"][0]
        text, reason = choice["text"], choice["finish_reason"]
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_n_choices_have_seeds_one_after_another(server: Server) -> None:
    how = {"temperature": 1.0, "top_p": 0.9, "top_k": 12}
    body = {"model": NAME, "prompt": "Hello", "max_tokens": 6, "n": 3, "seed": 5} | how
    expected = [text_of("Hello", 6, how=how | {"seed": 5 + index}) for index in range(3)]
    _, answer = server.ask(TEXT, body)
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 18, "total_tokens": 23} | NONE_CACHED
    texts = ["", "", ""]
    for event in server.events(TEXT, body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == expected


def test_prompts_may_be_several_or_token_ids(server: Server) -> None:
    for prompt in (["Hello", "Hi"], [[7, 30, 37, 37, 40], [7, 34]]):
        _, answer = server.ask(TEXT, GREEDY | {"prompt": prompt, "max_tokens": 5})
        assert [choice["text"] for choice in answer["choices"]] == [text_of("Hello", 5), text_of("Hi", 5)]
    _, answer = server.ask(TEXT, GREEDY | {"prompt": [7, 34], "max_tokens": 5})
    assert answer["choices"][0]["text"] == text_of("Hi", 5)


def test_an_empty_prompt_begins_a_text(server: Server) -> None:
    _, answer = server.ask(TEXT, GREEDY | {"prompt": "", "max_tokens": 5})
    assert answer["choices"][0]["text"] == text_of("H", 5)


def test_null_and_defaults_of_what_is_not_supported_change_nothing(server: Server) -> None:
    odd = {"logprobs": None, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "n": None, "stop": None}
    status, answer = server.ask(TEXT, GREEDY | odd | {"prompt": "Hi", "max_tokens": 3, "logit_bias": {}})
    assert (status, answer["choices"][0]["text"]) == (200, text_of("Hi", 3))


def test_requests_at_once_get_the_texts_that_they_get_alone(server: Server) -> None:
    prompts = [("Hello world"[: 1 + index % 11], 1 + index % 7) for index in range(24)]
    expected = [text_of(*prompt) for prompt in prompts]

    def ask(prompt: tuple[str, int]) -> str:
        return server.ask(TEXT, GREEDY | {"prompt": prompt[0], "max_tokens": prompt[1]})[1]["choices"][0]["text"]

    with compilations() as compiled, ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == expected
    assert compiled == []


def test_models_health_and_page(server: Server) -> None:
    status, models = server.ask("/v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, [NAME])
    assert server.ask(f"/v1/models/{NAME}") == (200, models["data"][0])
    assert server.ask("/health") == (200, {"status": "ok"})
    status, page = server.ask("/")
    assert status == 200
    assert page.startswith("<!doctype html>")
    assert "http" not in page.split("<script>")[0]


@pytest.mark.slow
def test_guesses_are_in_usage_and_metrics_and_change_no_text() -> None:
    mesh, repeated = mesh_of("data=1"), "abcabcabcabc"
    engine = Engine(CONFIG, params_on(CONFIG, mesh), mesh=mesh, slots=3, speculation=Speculation(tokens=3))
    with running(engine=AsyncEngine(engine)) as server:
        _, answer = server.ask(TEXT, GREEDY | {"prompt": repeated, "max_tokens": 40})
        text = server.ask("/metrics")[1]
    assert answer["choices"][0]["text"] == text_of(repeated, 40)
    right, wrong = answer["usage"]["completion_tokens_details"].values()
    assert engine.guessed_tokens == right + wrong > 0
    assert engine.accepted_tokens == right
    assert f"trellax_guessed_tokens_total {right + wrong}" in text.splitlines()
    assert f"trellax_accepted_tokens_total {right}" in text.splitlines()


def test_metrics_count_tokens_and_answers() -> None:
    with running() as server:
        server.ask(TEXT, GREEDY | {"prompt": "Hello", "max_tokens": 9, "n": 2})
        server.ask(TEXT, GREEDY | {"prompt": "Hello", "max_tokens": 0})
        server.ask("/v1/nothing")
        text = server.ask("/metrics")[1]
    for line in (
        'trellax_responses_total{path="/v1/completions",status="200"} 1',
        'trellax_responses_total{path="/v1/completions",status="400"} 1',
        'trellax_responses_total{path="other",status="404"} 1',
        'trellax_answers_total{reason="length"} 2',
        "trellax_prompt_tokens_total 5",
        "trellax_answer_tokens_total 18",
        "trellax_slots 3",
        "trellax_slots_used 0",
        "trellax_first_token_seconds_count 2",
        'trellax_answer_seconds_bucket{le="+Inf"} 2',
    ):
        assert line in text.splitlines()
