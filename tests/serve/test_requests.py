"""The queue and the slots, by properties over any arrival, length and end."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from trellax.serve import Request
from trellax.serve.requests import Chunk, RequestScheduler, ServedSequence

shapes = st.fixed_dictionaries(
    {"num_shards": st.integers(1, 3), "groups": st.integers(1, 3), "group_size": st.integers(1, 3)}
)
runs = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=30)
"""Requests: tokens of the prompt, tokens of the answer, and steps before the next comes."""


def test_tokens_of_an_array_are_whole_numbers() -> None:
    request = Request(prompt=np.array([1, 2]), stop=[np.int32(3)])  # type: ignore[arg-type]
    assert request == Request(prompt=(1, 2), stop=(3,))
    assert {type(token) for token in (*request.prompt, *request.stop)} == {int}


class Play:
    """An engine without a model: every step admits, reads chunks and adds a token to every sequence."""

    def __init__(self, shape: dict[str, int], *, size: int, limit: int) -> None:
        # For each slot as many pages as the longest request takes.
        self.scheduler = RequestScheduler(**shape, num_pages=shape["groups"] * shape["group_size"] * 7, page=2)
        self.num_slots = shape["num_shards"] * shape["groups"] * shape["group_size"]
        self.shard_size = shape["groups"] * shape["group_size"]
        self.size, self.limit = size, limit
        self.admitted: list[ServedSequence] = []
        self.chunks: list[Chunk] = []
        self.steps = 0

    def step(self) -> None:
        """One turn, with everything checked that must always hold."""
        self.steps += 1
        self.admitted += self.scheduler.admit()
        # Nobody waits while a slot is free.
        assert not self.scheduler.waiting or len(self.scheduler.running) == self.num_slots
        assert all(sequence.slot == slot for slot, sequence in self.scheduler.running.items())
        assert all(0 <= slot < self.num_slots for slot in self.scheduler.running)
        for shard, chunks in enumerate(self.scheduler.take_chunks(size=self.size, limit=self.limit)):
            assert len(chunks) <= self.limit
            assert all((chunk.sequence.slot or 0) // self.shard_size == shard for chunk in chunks)
            self.chunks += chunks
        for sequence in self.scheduler.decoding:
            sequence.tokens.append(0)
            if len(sequence.tokens) == sequence.request.max_new_tokens:
                self.scheduler.finish(sequence, "length")


@given(shape=shapes, requests=runs, size=st.integers(1, 4), limit=st.integers(1, 3))
def test_requests_are_served_in_order_and_no_slot_serves_two(
    shape: dict[str, int], requests: list[tuple[int, int, int]], size: int, limit: int
) -> None:
    play, sequences = Play(shape, size=size, limit=limit), []
    for prompt, new, pause in requests:
        sequences.append(play.scheduler.submit(Request(prompt=tuple(range(prompt)), max_new_tokens=new)))
        for _ in range(pause):
            play.step()
    # At worst one chunk is read and one token made in a step: more steps would be starvation.
    bound = play.steps + sum(prompt + new + 1 for prompt, new, _ in requests)
    while not play.scheduler.is_idle:
        play.step()
        assert play.steps <= bound
    assert [sequence.id for sequence in play.admitted] == list(range(len(requests)))
    assert [len(sequence.tokens) for sequence in sequences] == [new for _, new, _ in requests]
    for sequence in sequences:
        own = [chunk for chunk in play.chunks if chunk.sequence is sequence]
        # All prompts begin alike: what an earlier one has read is not read again.
        assert [token for chunk in own for token in chunk.tokens] == list(sequence.request.prompt[own[0].start :])
        assert own[0].start == sequence.num_shared <= len(sequence.request.prompt) - 1
        assert [chunk.is_last for chunk in own] == [False] * (len(own) - 1) + [True]
        assert all(len(chunk.tokens) == size for chunk in own[:-1])


@given(shape=shapes, num_requests=st.integers(1, 9))
def test_groups_get_equally_many(shape: dict[str, int], num_requests: int) -> None:
    scheduler = RequestScheduler(**shape, num_pages=60, page=4)
    for _ in range(num_requests):
        scheduler.submit(Request(prompt=(1,), max_new_tokens=4))
    scheduler.admit()
    num_groups = shape["num_shards"] * shape["groups"]
    loads = [sum(slot // shape["group_size"] == group for slot in scheduler.running) for group in range(num_groups)]
    assert max(loads) - min(loads) <= 1
