"""Streams of tokens and cancellations: what is left gets the tokens that it would get alone, and slots come back."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trellax.meshes import ServeError
from trellax.programs import compilations
from trellax.serve import Engine, Request
from trellax.serve.async_engine import AsyncEngine, TokenStream

from .models import answer_of, engine_on, model_of, requests_of

REQUESTS = [*requests_of("greedy", 6), *requests_of("sampled", 6)]
LONG = Request(prompt=(1, 2, 3), max_new_tokens=20)


@pytest.fixture(scope="module", params=["data=1", "data=2,pipe=2"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """One device, and stages between which a token may be when its request is cancelled."""
    return engine_on(request.param, slots=4, rounds=2, chunks_per_step=2)


arrivals = st.lists(
    st.tuples(st.integers(0, len(REQUESTS) - 1), st.integers(0, 2), st.none() | st.integers(0, 5)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=arrivals)
def test_cancelled_requests_change_no_other_answer(engine: Engine, arrivals: list[tuple[int, int, int | None]]) -> None:
    """Each arrival is a request, the number of steps after which it comes, and of those after which it is cancelled."""
    expected = [answer_of(model_of("llama"), REQUESTS[index]) for index, _, _ in arrivals]
    sequences, ends = [], []

    def step() -> None:
        engine.step()
        for place, (sequence, left) in enumerate(zip(sequences, ends, strict=True)):
            ends[place] = None if left is None else left - 1
            if left == 0:
                engine.cancel(sequence)

    with compilations() as compiled:
        for index, pause, end in arrivals:
            for _ in range(pause):
                step()
            sequences.append(engine.submit(REQUESTS[index]))
            ends.append(end)
        while not engine.scheduler.is_idle:
            step()
    assert compiled == []
    for sequence, (tokens, reason) in zip(sequences, expected, strict=True):
        if sequence.finish_reason == "cancelled":
            assert tuple(sequence.tokens) == tokens[: len(sequence.tokens)]
        else:
            assert (tuple(sequence.tokens), sequence.finish_reason) == (tokens, reason)


def test_a_cancelled_slot_is_free_after_one_step(engine: Engine) -> None:
    sequences = [engine.submit(LONG) for _ in range(6)]
    engine.step()
    for sequence in sequences:
        engine.cancel(sequence)
    assert not engine.scheduler.waiting
    engine.step()
    assert engine.scheduler.is_idle
    assert {sequence.finish_reason for sequence in sequences} == {"cancelled"}


def test_a_callback_may_be_taken_away_while_it_is_called(engine: Engine) -> None:
    def take_away(*_: object) -> None:
        engine.on_token = None

    engine.on_token = take_away
    assert engine.generate([LONG])[0].tokens == answer_of(model_of("llama"), LONG)[0]


def test_cancelling_an_ended_request_changes_nothing(engine: Engine) -> None:
    sequence = engine.submit(REQUESTS[0])
    while not engine.scheduler.is_idle:
        engine.step()
    engine.cancel(sequence)
    assert (tuple(sequence.tokens), sequence.finish_reason) == answer_of(model_of("llama"), REQUESTS[0])


def serve(engine: Engine, work: Callable[[AsyncEngine], Awaitable[Any]], **settings: Any) -> Any:
    """Run a coroutine with an engine, which must be idle at the end."""

    async def run() -> Any:
        async with AsyncEngine(engine, **settings) as served:
            return await asyncio.wait_for(work(served), 60)

    result = asyncio.run(run())
    assert engine.scheduler.is_idle
    return result


async def read(stream: TokenStream) -> tuple[tuple[int, ...], Any]:
    return tuple([token async for token in stream]), stream.finish_reason


def test_streams_give_each_request_the_tokens_that_it_gets_alone(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> Any:
        return await asyncio.gather(*[read(served.submit(request)) for request in REQUESTS])

    assert serve(engine, work) == [answer_of(model_of("llama"), request) for request in REQUESTS]


def test_a_cancelled_stream_ends_at_once_and_the_others_go_on(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> Any:
        first, second = served.submit(LONG), served.submit(LONG)
        heard = await first.take()
        first.cancel()
        assert await first.take() == ()
        assert served.num_open == 1
        return heard, first.finish_reason, await read(second)

    heard, reason, other = serve(engine, work)
    expected = answer_of(model_of("llama"), LONG)
    assert (heard, reason, other) == (expected[0][: len(heard)], "cancelled", expected)


def test_a_full_queue_refuses_and_later_has_room_again(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        streams = [served.submit(LONG) for _ in range(5)]
        with pytest.raises(ServeError, match="5 requests are in progress, all that 4 slots and a queue of 1 take"):
            served.submit(LONG)
        streams[0].cancel()
        await read(served.submit(LONG))
        await served.drain()
        assert served.num_free == 5

    serve(engine, work, max_waiting=1)


def test_a_request_that_does_not_fit_is_refused_by_submit(engine: Engine) -> None:
    async def work(served: AsyncEngine) -> None:
        with pytest.raises(ServeError, match="but the model reads"):
            served.submit(Request(prompt=(1,) * 99))
        assert served.num_open == 0

    serve(engine, work)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_ends_every_stream_with_its_error(engine: Engine) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no device")

    async def work(served: AsyncEngine) -> None:
        with pytest.raises(ServeError, match="the engine has stopped: OSError: no device"):
            await read(served.submit(LONG))
        with pytest.raises(ServeError, match="the engine has stopped"):
            served.submit(LONG)

    engine.on_token = fail
    asyncio.run(asyncio.wait_for(_with(engine, work), 60))
    engine.on_token = None
    while not engine.scheduler.is_idle:
        engine.step()


async def _with(engine: Engine, work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async with AsyncEngine(engine) as served:
        await work(served)
