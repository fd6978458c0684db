"""A second engine that repeats the events of the first has the same sequences, with company, cancels and penalties."""

import json
import random
from collections.abc import Iterator

import pytest
from trellax.serve import Request
from trellax.serve.processes.events import Event, read_events, write_events
from trellax.serve.processes.follow import follow

from ..models import engine_on, requests_of


def test_events_come_back_as_they_were() -> None:
    request = Request(
        prompt=(1, 2),
        temperature=0.1 + 0.2,
        logit_bias=((3, 1 / 3), (4, -100.0)),
        stop=(5,),
        logprobs=2,
        seed=2**32 - 1,
    )
    events: list[Event] = [request, 7, Request(prompt=(1,))]
    text = write_events(events)
    assert read_events(text) == events
    assert json.loads(text)[1] == 7


@pytest.mark.parametrize("mesh", ["data=2", pytest.param("data=2,pipe=2", marks=pytest.mark.slow)])
def test_follower_has_the_sequences_of_the_leader(mesh: str) -> None:
    rng = random.Random(0)
    leader, follower = (engine_on(mesh, slots=4, rounds=2, chunks_per_step=2) for _ in range(2))
    requests = [*requests_of("greedy", 6), *requests_of("sampled", 6)]
    followed = []

    def steps() -> Iterator[list[Event]]:
        """The leader steps between two steps of the follower, as on another process."""
        sequences = []
        while requests or not leader.scheduler.is_idle:
            events: list[Event] = []
            for _ in range(min(len(requests), rng.randrange(3))):
                sequences.append(leader.submit(requests.pop()))
                events.append(sequences[-1].request)
            if sequences and rng.random() < 0.2:
                leader.cancel(sequences[-1])
                events.append(sequences[-1].id)
            leader.step()
            yield read_events(write_events(events))
        followed.extend(sequences)

    seen = {}
    submit = follower.submit

    def noting(request: Request) -> object:
        sequence = submit(request)
        seen[sequence.id] = sequence
        return sequence

    follower.submit = noting  # type: ignore[method-assign]
    assert follow(follower, steps()) > 6
    assert {s.id: (s.tokens, s.finish_reason) for s in followed} == {
        key: (s.tokens, s.finish_reason) for key, s in seen.items()
    }
    assert {s.finish_reason for s in followed} >= {"cancelled", "length"}
