"""Who is served when: a queue, slots, and prompts cut into chunks. Plain Python, no jax.

First come, first served: a request takes a slot as soon as one is free, and prompts are read in the order in which they
took theirs. `engine.py` drives it.
"""

import operator
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..meshes import ServeError
from ..meshes.arguments import check_count, check_number

FinishReason = Literal["stop", "length", "error"]
"""Why a sequence ended: a stop token, its own limit of tokens or the cache's, or logits that are not finite."""

_HOTTEST = 3.4e38
"""A larger temperature would be infinite in float32, and any token as likely as another."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt as token ids, and how to go on from it.

    Args:
        prompt: whole numbers; a list or an array becomes a tuple, and so does that of `stop`.
        max_new_tokens: tokens to add at most.
        temperature: 0 takes the likeliest token; else what logits are divided by before a draw.
        top_k: draw among so many of the likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens that together have this probability; 1 for all.
        seed: of the draws; the same seed gives the same tokens on any mesh, among any other requests.
        stop: tokens that end the sequence; they are not part of the answer.

    Raises:
        ServeError: the prompt is empty, a token is no whole number, or a number is out of its range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "stop"):
            object.__setattr__(self, name, _read_tokens(name, getattr(self, name)))
        if not self.prompt:
            raise ServeError("a prompt is empty: there is nothing to go on from.", fix="give at least one token.")
        for name in ("max_new_tokens", "top_k", "seed"):
            check_count(name, getattr(self, name), error=ServeError, least=1 if name == "max_new_tokens" else 0)
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name), error=ServeError)
        ranges = {
            "temperature": (self.temperature <= _HOTTEST, f"from 0 to {_HOTTEST:g}, what float32 holds"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "seed": (self.seed < 2**32, "from 0 to 4294967295"),
        }
        for name, (is_right, wanted) in ranges.items():
            if not is_right:
                raise ServeError(f"{name}={getattr(self, name)} is out of range.", fix=f"give {wanted}.")


def _read_tokens(name: str, tokens: Any) -> tuple[int, ...]:
    """Any whole numbers as a tuple of Python's own."""
    try:
        return tuple(map(operator.index, tokens))
    except TypeError:
        shown = repr(tokens)
        raise ServeError(
            f"{name}={shown if len(shown) <= 60 else f'{shown[:57]}...'} are no token ids, which are whole numbers.",
            fix="encode a text with the tokenizer of the model.",
        ) from None


@dataclass(kw_only=True)
class Sequence:
    """A request on its way: its slot once it has one, and its answer so far."""

    id: int
    request: Request
    slot: int | None = None
    num_read: int = 0
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def is_decoding(self) -> bool:
        """Whether its prompt is read and its answer is not at its end."""
        return self.num_read == len(self.request.prompt) and self.finish_reason is None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a sequence's prompt: tokens `start` on, for the cache row of its slot."""

    sequence: Sequence
    start: int
    tokens: tuple[int, ...]

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends here."""
        return self.start + len(self.tokens) == len(self.sequence.request.prompt)


class Schedule:
    """The queue and the slots: `num_shards` data shards with `groups` groups of `group_size` slots each.

    >>> schedule = Schedule(num_shards=1, groups=2, group_size=1)
    >>> waiting = [schedule.submit(Request(prompt=(1, 2, 3))) for _ in range(3)]
    >>> [sequence.slot for sequence in schedule.admit()]
    [0, 1]
    """

    def __init__(self, *, num_shards: int, groups: int, group_size: int) -> None:
        self.num_shards, self.groups, self.group_size = num_shards, groups, group_size
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}
        self._reading: list[deque[Sequence]] = [deque() for _ in range(num_shards)]
        self._num_submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    @property
    def decoding(self) -> list[Sequence]:
        """The sequences whose next token is due."""
        return [sequence for sequence in self.running.values() if sequence.is_decoding]

    def submit(self, request: Request) -> Sequence:
        """Put a request at the end of the queue."""
        sequence = Sequence(id=self._num_submitted, request=request)
        self._num_submitted += 1
        self.waiting.append(sequence)
        return sequence

    def admit(self) -> list[Sequence]:
        """Give free slots to those that wait, the first first, and return them."""
        admitted = []
        while self.waiting and (slot := self._free_slot()) is not None:
            sequence = self.waiting.popleft()
            sequence.slot = slot
            self.running[slot] = sequence
            self._reading[slot // self._slots_per_shard].append(sequence)
            admitted.append(sequence)
        return admitted

    def take_chunks(self, *, size: int, limit: int) -> list[list[Chunk]]:
        """Return the next chunks to read on each data shard, at most `limit`; they count as read."""
        return [list(self._take(reading, size, limit)) for reading in self._reading]

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take note that a sequence has ended; its slot is free."""
        assert sequence.slot is not None
        assert self.running[sequence.slot] is sequence
        sequence.finish_reason = reason
        del self.running[sequence.slot]

    @property
    def _slots_per_shard(self) -> int:
        return self.groups * self.group_size

    def _free_slot(self) -> int | None:
        """The first free slot of the group that has most of them: groups that are alike keep all stages at work."""
        groups = [range(first, first + self.group_size) for first in self._first_slots()]
        free = [[slot for slot in group if slot not in self.running] for group in groups]
        emptiest = max(free, key=len)
        return emptiest[0] if emptiest else None

    def _first_slots(self) -> Iterable[int]:
        return range(0, self.num_shards * self._slots_per_shard, self.group_size)

    def _take(self, reading: deque[Sequence], size: int, limit: int) -> Iterable[Chunk]:
        for _ in range(limit):
            if not reading:
                return
            sequence = reading[0]
            tokens = sequence.request.prompt[sequence.num_read : sequence.num_read + size]
            chunk = Chunk(sequence=sequence, start=sequence.num_read, tokens=tokens)
            sequence.num_read += len(tokens)
            if chunk.is_last:
                reading.popleft()
            yield chunk
