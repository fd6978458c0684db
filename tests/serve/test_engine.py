"""An engine gives each request the answer that it would get alone, on any mesh and beside any others."""

from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trellax.meshes import ServeError
from trellax.programs import compilations
from trellax.serve import Engine, Request, param_shapes
from trellax.serve.pages import PagePool
from trellax.serve.params import stage_params

from .models import MAX_TOKENS, answer_of, engine_on, logits_of, model_of, numbers_of, requests_of

REQUESTS = [*requests_of("greedy", 6), *requests_of("sampled", 8), *requests_of("changed", 6)]

STOPPING = Request(prompt=(5, 6, 7), max_new_tokens=12, temperature=1.0, seed=3, stop=tuple(range(0, 64, 9)))


shared = cache(engine_on)
"""Engines that several tests use, one after another: compiling takes longer than answering."""


def check_answers(engine: Engine, style: str, requests: list[Request]) -> None:
    """Each request gets just what recomputing everything gives it alone."""
    found = engine.generate(requests)
    expected = [answer_of(model_of(style), request) for request in requests]
    assert [(completion.tokens, completion.finish_reason) for completion in found] == expected


MANY_STOPS: dict[str, Any] = {"layers": "unrolled", "slots": 4, "max_stops": 13}

SAMPLE = [
    ("data=1", "llama", {"slots": 3}),
    ("pipe=4", "gpt", {"slots": 4}),
    ("data=2,tensor=2,pipe=2", "llama", {}),
    ("pipe=4", "gpt", {"slots": 1, "groups": 1}),
    ("pipe=2", "uneven", MANY_STOPS),
    ("data=2,tensor=2,pipe=2", "experts", {}),
    ("expert=2,tensor=2,pipe=2", "experts", {}),
]
MORE = [
    ("tensor=4", "llama", {}),
    ("data=2", "gpt", {}),
    ("tensor=2", "gpt", {}),
    ("pipe=2", "llama", {"groups": 4}),
    ("data=2,pipe=4", "gpt", {"groups": 2}),
    ("tensor=2,pipe=4", "llama", {"groups": 8}),
    ("data=4,tensor=2", "llama", {"slots": 4}),
    ("tensor=8", "llama", {"chunk": 1}),
    ("data=1", "experts", {"layers": "unrolled", "slots": 3}),
    ("data=2,tensor=2,pipe=2", "deepseek", {"layers": "unrolled"}),
    ("tensor=4", "latents", {"slots": 3}),
    ("pipe=4", "experts", {}),
    ("tensor=4", "experts", {"chunk": 1}),
    ("expert=2", "experts", {"slots": 2, "chunk": 1}),
    ("expert=4", "deepseek", {"slots": 12, "groups": 3, "cache_tokens": 240}),
    ("data=2,expert=2,pipe=2", "dense_and_experts", {"layers": "unrolled"}),
    ("expert=4,tensor=2", "experts", {"slots": 4}),
    ("expert=2,pipe=4", "experts", {"groups": 2, "slots": 8}),
    ("dp=2:batch,ep=2:expert,tp=2:tensor", "experts", {}),
    ("outer=2:tensor,inner=4:tensor", "llama", {"layers": "unrolled"}),
    ("replica=2:batch,own=2:tensor,pp=2:pipe", "uneven", {}),
]


@pytest.mark.parametrize(("mesh", "style", "sizes"), SAMPLE)
def test_answers_are_those_of_one_device_without_a_cache(mesh: str, style: str, sizes: dict[str, Any]) -> None:
    check_answers(shared(mesh, style, **sizes), style, [*REQUESTS, STOPPING])


def test_engine_accepts_as_many_stop_tokens_as_a_model_has() -> None:
    request = replace(STOPPING, stop=tuple(range(0, 64, 5)))
    check_answers(shared("pipe=2", "uneven", **MANY_STOPS), "uneven", [request])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "style", "sizes"), MORE)
def test_answers_are_those_of_one_device_on_more_meshes(mesh: str, style: str, sizes: dict[str, Any]) -> None:
    check_answers(engine_on(mesh, style, **sizes), style, [*REQUESTS, STOPPING])


@pytest.fixture(scope="module")
def busy_engine() -> Engine:
    """Two stages, two data shards, three groups of one slot: requests must wait, groups are no multiple of ranks."""
    return engine_on("data=2,pipe=2", slots=6, groups=3, rounds=2, chunks_per_step=2)


@pytest.fixture(scope="module")
def short_engine() -> Engine:
    """The same with pages for two and a half of the longest requests on each data shard."""
    return engine_on("data=2,pipe=2", slots=6, groups=3, rounds=2, chunks_per_step=2, cache_tokens=120)


def alike(request: Request) -> Request:
    """The request with one of two beginnings that others have too."""
    begin = ((1, 2, 3, 4, 5), (1, 2, 6))[len(request.prompt) % 2]
    return replace(request, prompt=(*begin, *request.prompt[:8]))


ALIKE = [alike(request) for request in REQUESTS]
arrivals_and_ends = st.lists(
    st.tuples(st.integers(0, len(ALIKE) - 1), st.integers(0, 2), st.none() | st.integers(0, 5)), min_size=1, max_size=16
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=arrivals_and_ends)
def test_requests_that_share_pages_and_wait_for_them_get_the_answers_of_requests_alone(
    short_engine: Engine, arrivals: list[tuple[int, int, int | None]]
) -> None:
    """Each arrival is a request, the steps after which it comes, and those after which it is cancelled."""
    sequences: list[Any] = []

    def step() -> None:
        short_engine.step()
        for place, (sequence, left) in enumerate(sequences):
            sequences[place] = sequence, None if left is None else left - 1
            if left == 0:
                short_engine.cancel(sequence)

    with compilations() as compiled:
        for index, pause, end in arrivals:
            for _ in range(pause):
                step()
            sequences.append((short_engine.submit(ALIKE[index]), end))
        while not short_engine.scheduler.is_idle:
            step()
    assert compiled == []
    for (sequence, _), (index, _, _) in zip(sequences, arrivals, strict=True):
        tokens, reason = answer_of(model_of("llama"), ALIKE[index])
        if sequence.finish_reason == "cancelled":
            tokens, reason = tokens[: len(sequence.tokens)], "cancelled"
        assert (tuple(sequence.tokens), sequence.finish_reason) == (tokens, reason)
    assert [pool.num_free for pool in short_engine.scheduler.pools] == [short_engine.sizes.pages_per_shard] * 2


@pytest.mark.parametrize(("mesh", "style"), [("data=1", "llama"), ("tensor=2,pipe=2", "deepseek")])
def test_a_shared_prompt_is_read_once(mesh: str, style: str) -> None:
    engine, system = engine_on(mesh, style, slots=4, cache_tokens=64), tuple(range(10, 20))
    requests = [Request(prompt=(*system, 30 + index), max_new_tokens=3) for index in range(6)]
    check_answers(engine, style, requests)
    assert (engine.usage.read_tokens, engine.usage.shared_tokens) == (11 + 5, 5 * 10)
    # Also after all have ended, and others have taken pages.
    check_answers(engine, style, [Request(prompt=(5, 6, 7), max_new_tokens=9)])
    before = engine.usage.read_tokens
    check_answers(engine, style, requests)
    assert engine.usage.read_tokens == before + len(requests)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(st.tuples(st.integers(0, len(REQUESTS) - 1), st.integers(0, 3)), min_size=1, max_size=16))
def test_requests_that_arrive_at_any_time_get_the_answers_of_requests_alone(
    busy_engine: Engine, arrivals: list[tuple[int, int]]
) -> None:
    """Each arrival is a request and the number of steps after which it comes; the engine is the same all the time."""
    sequences = []
    with compilations() as compiled:
        for index, steps in arrivals:
            for _ in range(steps):
                busy_engine.step()
            sequences.append(busy_engine.submit(REQUESTS[index]))
        while not busy_engine.scheduler.is_idle:
            busy_engine.step()
    expected = [answer_of(model_of("llama"), REQUESTS[index]) for index, _ in arrivals]
    assert [(tuple(s.tokens), s.finish_reason) for s in sequences] == expected
    assert compiled == []


@pytest.mark.parametrize(("mesh", "style", "slots"), [("data=1", "llama", 3), ("data=2,tensor=2,pipe=2", "llama", 8)])
def test_log_probabilities_are_those_of_the_models_own_logits(mesh: str, style: str, slots: int) -> None:
    requests = [replace(request, logprobs=5) for request in REQUESTS[-6:]]
    engine = shared(mesh, style, **({"slots": slots} if mesh == "data=1" else {}))
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        whole = np.asarray([[*request.prompt, *completion.tokens]])
        logits_TV = logits_of(model_of(style), whole)[0, len(request.prompt) - 1 : -1].astype(np.float64)
        expected_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        assert [one.token for one in completion.logprobs] == list(completion.tokens)
        for found, expected_V in zip(completion.logprobs, expected_TV, strict=True):
            assert found.logprob == pytest.approx(expected_V[found.token], abs=1e-4)
            assert [token for token, _ in found.top] == np.argsort(-expected_V)[:5].tolist()
            assert [value for _, value in found.top] == pytest.approx(np.sort(expected_V)[::-1][:5].tolist(), abs=1e-4)


def test_penalties_change_answers() -> None:
    """Else the tests of this file would not see them."""
    penalized = [request for request in REQUESTS[-6:] if request.has_penalty]
    plain = [replace(one, repetition_penalty=1, frequency_penalty=0, presence_penalty=0) for one in penalized]
    answers = [
        (answer_of(model_of("llama"), one), answer_of(model_of("llama"), other))
        for one, other in zip(penalized, plain, strict=True)
    ]
    assert sum(one != other for one, other in answers) >= 2


def test_callback_gets_every_token_in_order() -> None:
    heard: list[tuple[int, int]] = []
    engine = shared("data=1", "llama", slots=3)
    engine.on_token = lambda sequence, token: heard.append((sequence.id, token))
    sequences = [engine.submit(request) for request in REQUESTS[:4]]
    while not engine.scheduler.is_idle:
        engine.step()
    engine.on_token = None
    told = [[token for own, token in heard if own == sequence.id] for sequence in sequences]
    assert told == [sequence.tokens for sequence in sequences]


class LostError(Exception):
    """Whoever listened has gone."""


def test_a_callback_that_raises_loses_no_token() -> None:
    def fail(*_: Any) -> None:
        raise LostError

    engine = shared("data=1", "llama", slots=3)
    engine.on_token = fail
    sequences = [engine.submit(request) for request in REQUESTS[:4]]
    for _ in range(MAX_TOKENS * len(sequences)):
        with suppress(LostError):
            engine.step()
    engine.on_token = None
    assert engine.scheduler.is_idle
    assert [tuple(s.tokens) for s in sequences] == [answer_of(model_of("llama"), s.request)[0] for s in sequences]


def test_top_k_above_the_vocabulary_keeps_all_tokens() -> None:
    requests = [Request(prompt=(1, 2), max_new_tokens=4, temperature=1.0, top_k=top_k) for top_k in (0, 2**40)]
    every, more = shared("data=1", "llama", slots=3).generate(requests)
    assert more == every


def test_a_full_row_of_the_cache_can_be_used_to_its_end() -> None:
    request = Request(prompt=tuple(range(1, 10)), max_new_tokens=MAX_TOKENS - 9)
    check_answers(shared("data=1", "llama", slots=3), "llama", [request])


def test_a_request_that_overflows_leaves_nothing_to_the_next_in_its_slot() -> None:
    engine = shared("data=1", "llama", slots=3)
    sequences = [engine.submit(request) for request in REQUESTS[:3]]
    engine.step()
    state = engine._state
    keys, values = ((stack[0] * np.nan,) for stack in (state.cache.keys, state.cache.values))
    poisoned = replace(state.cache, values=values, keys=keys)
    engine._state = replace(state, cache=poisoned)
    told = []
    while not engine.scheduler.is_idle:
        try:
            engine.step()
        except ServeError as error:
            told.append(str(error))
    assert all(sequence.finish_reason for sequence in sequences)
    assert "logits are NaN or infinite" in told[0]
    # What sequences have left that ended before.
    engine.scheduler.pools = [PagePool(num_pages=engine.sizes.pages_per_shard, page=engine.sizes.page)]
    check_answers(engine, "llama", REQUESTS[2:6])


def test_stages_are_busy_when_there_are_as_many_groups() -> None:
    requests = [Request(prompt=(index, 2, 3), max_new_tokens=20) for index in range(4)]
    idle, work = [], []
    for groups in (4, 1):
        engine = shared("pipe=4", "gpt", slots=groups, **({"groups": 1} if groups == 1 else {}))
        before = engine.usage
        check_answers(engine, "gpt", requests)
        after = engine.usage
        busy, ticks = after.busy - before.busy, after.decode_ticks - before.decode_ticks
        idle.append(1 - busy.mean() / (ticks + after.prefill_ticks - before.prefill_ticks))
        work.append(int(busy.sum()))
    assert idle[0] < 0.25
    assert idle[1] == pytest.approx(0.75, abs=0.02)
    assert work[0] == work[1]


@pytest.mark.parametrize(("mesh", "style"), [("data=1", "llama"), ("data=2,tensor=2,pipe=2", "llama")])
def test_logits_that_are_not_finite_are_an_error_and_stop_no_other_sequence(mesh: str, style: str) -> None:
    engine = shared(mesh, style, **({"slots": 3} if mesh == "data=1" else {}))
    whole, config = engine._params, model_of(style)
    params = numbers_of(config)
    for poison in (np.nan, -np.nan, np.inf):
        table = params["embed"]["table"].copy()
        table[7] = poison  # the layers spread it, but for the requests that never see this token
        poisoned = params | {"embed": {**params["embed"], "table": table}}
        placed = jax.tree.map(
            lambda leaf, shape: jax.device_put(leaf, shape.sharding), poisoned, param_shapes(config, mesh=engine.mesh)
        )
        engine._params = stage_params(placed, config=config, mesh=engine.mesh, layers=engine.layers)
        try:
            sick = engine.submit(Request(prompt=(5, 7, 6), max_new_tokens=4))
            well = engine.submit(Request(prompt=(5, 6, 8), max_new_tokens=1, temperature=1.0, top_k=3))
            with pytest.raises(ServeError, match=r"after 0 tokens .* logits are NaN or infinite"):
                engine.step()
            while not engine.scheduler.is_idle:
                engine.step()
        finally:
            engine._params = whole
        assert (sick.tokens, sick.finish_reason) == ([], "error")
        assert (tuple(well.tokens), well.finish_reason) == answer_of(config, well.request)
    check_answers(engine, style, REQUESTS[:3])
