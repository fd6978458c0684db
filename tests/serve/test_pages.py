"""Pages: shared beginnings, recency, and a scheduler short of pages, by properties over any requests."""

from collections import Counter
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from trellax.serve import Request
from trellax.serve.pages import PagePool
from trellax.serve.requests import RequestScheduler, ServedSequence

PAGE, NUM_PAGES = 2, 8


def read(pool: PagePool, pages: list[int] | None, prompt: tuple[int, ...]) -> list[int]:
    """Pages whose prompt the devices have been given."""
    assert pages is not None
    pool.mark_read(pages, num_tokens=len(prompt))
    return pages


def test_a_sequence_has_no_more_pages_than_its_tokens_fill() -> None:
    pool = PagePool(num_pages=NUM_PAGES, page=PAGE)
    assert [len(pool.take((1,), num_tokens=count) or ()) for count in (1, 2, 3, 4)] == [1, 1, 2, 2]
    assert pool.num_free == 2
    assert pool.take((1,), num_tokens=5) is None
    assert pool.num_free == 2


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    pool, prompt = PagePool(num_pages=NUM_PAGES, page=PAGE), (1, 2, 3, 4)
    read(pool, pool.take(prompt, num_tokens=4), prompt)
    again = pool.take(prompt, num_tokens=4)
    assert again is not None
    assert pool.num_read(again, prompt) == 2
    assert pool.num_shared((*prompt, 5)) == 4


def test_long_sequences_share_pages_with_long_ones_alone() -> None:
    pool, prompt = PagePool(num_pages=9, page=PAGE, long_from=6), (1, 2, 3, 4, 5)
    for num_tokens in (6, 7):
        assert pool.num_shared(prompt, num_tokens=num_tokens) == 0
        read(pool, pool.take(prompt, num_tokens=num_tokens), prompt)
        assert pool.num_shared(prompt, num_tokens=num_tokens) == 4


def test_what_was_not_read_is_not_shared_as_read() -> None:
    pool, prompt = PagePool(num_pages=NUM_PAGES, page=PAGE), (1, 2, 3, 4, 5)
    first = pool.take(prompt, num_tokens=5)
    second = pool.take(prompt, num_tokens=5)
    assert first is not None
    assert second is not None
    assert first[:2] == second[:2]
    pool.mark_read(first, num_tokens=3)
    pool.give_back(first)  # cancelled in the middle of its second page
    assert pool.num_read(second, prompt) == 2


def test_the_prefix_used_longest_ago_goes_first_and_its_end_before_its_beginning() -> None:
    pool = PagePool(num_pages=4, page=PAGE)
    old, new = (1, 1, 2, 2), (3, 3, 4, 4)
    for prompt in (old, new):
        pool.give_back(read(pool, pool.take(prompt, num_tokens=4), prompt))
    assert pool.take((9,), num_tokens=1) is not None
    assert [pool.num_shared((*prompt, 5)) for prompt in (old, new)] == [2, 4]


def test_forgotten_pages_are_found_by_nobody_and_come_back() -> None:
    pool, prompt = PagePool(num_pages=4, page=PAGE), (1, 2, 3, 4, 5)
    pages = read(pool, pool.take(prompt, num_tokens=5), prompt)
    pool.forget(pages)
    assert pool.num_shared(prompt) == 0
    pool.give_back(pages)
    assert pool.take((7,), num_tokens=8) is not None


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=9),
        st.integers(1, 6),
        st.integers(0, 2),
        st.none() | st.integers(0, 6),
    ),
    min_size=1,
    max_size=30,
)
"""Prompts of two letters, so that many begin alike; tokens of the answer; steps until the next, and until cancelled."""


class Play:
    """An engine without a model, whose cache says which token is at which place."""

    def __init__(self, num_shards: int) -> None:
        self.scheduler = RequestScheduler(num_shards=num_shards, groups=1, group_size=3, num_pages=NUM_PAGES, page=PAGE)
        self.cache: dict[Any, int] = {}

    def step(self) -> None:
        """Admit, read and decode, with everything checked that must always hold."""
        scheduler = self.scheduler
        scheduler.admit()
        for shard, chunks in enumerate(scheduler.take_chunks(size=3, limit=2)):
            for chunk in chunks:
                for place, token in enumerate(chunk.tokens, start=chunk.start):
                    self.write(shard, chunk.sequence, place, token)
        for sequence in scheduler.decoding:
            shard = (sequence.slot or 0) // 3
            if sequence.tokens:
                self.write(shard, sequence, len(sequence.request.prompt) + len(sequence.tokens) - 1, 7)
            self.check_cache(shard, sequence)
            sequence.tokens.append(7)
            if sequence.finish_reason or len(sequence.tokens) == sequence.request.max_new_tokens:
                scheduler.finish(sequence, "length")
        self.check_pools()

    def write(self, shard: int, sequence: ServedSequence, place: int, token: int) -> None:
        """Store a token as the devices would."""
        self.cache[shard, sequence.pages[place // PAGE], place % PAGE] = token

    def check_cache(self, shard: int, sequence: ServedSequence) -> None:
        """What attention reads must be the sequence's own tokens."""
        expected = [*sequence.request.prompt, *sequence.tokens]
        pages = sequence.pages
        assert expected == [self.cache[shard, pages[at // PAGE], at % PAGE] for at in range(len(expected))]

    def check_pools(self) -> None:
        """Every page is free, kept, or of as many sequences as it counts."""
        for shard, pool in enumerate(self.scheduler.pools):
            own = [s for slot, s in self.scheduler.running.items() if slot // 3 == shard]
            users = Counter(page for sequence in own for page in sequence.pages)
            assert [page.num_users for page in pool._pages] == [users[number] for number in range(NUM_PAGES)]
            assert sorted([*pool._free, *pool._kept, *users]) == list(range(NUM_PAGES))


@given(num_shards=st.integers(1, 2), requests=requests)
def test_sequences_find_their_own_tokens_however_short_pages_are(num_shards: int, requests: list[Any]) -> None:
    play, cancels, sequences = Play(num_shards), {}, []

    def step() -> None:
        play.step()
        for sequence, left in tuple(cancels.items()):
            cancels[sequence] = left - 1
            if left == 0 and sequence.finish_reason is None:
                play.scheduler.cancel(sequence)

    for prompt, new, pause, end in requests:
        sequences.append(play.scheduler.submit(Request(prompt=tuple(prompt), max_new_tokens=new)))
        if end is not None:
            cancels[sequences[-1]] = end
        for _ in range(pause):
            step()
    # More steps would be a deadlock: each reads a chunk or writes a token of the first that was admitted.
    for _ in range(sum(len(prompt) + new + 2 for prompt, new, _, _ in requests)):
        step()
    assert play.scheduler.is_idle
    assert all(sequence.finish_reason for sequence in sequences)
