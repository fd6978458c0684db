"""Schedule requests: a queue, slots, and prompts cut into chunks. Plain Python, no jax.

Requests are served first come, first served: each takes a slot as soon as one is free on a data shard with enough free
pages, and prompts are read in the order of admission, without their beginnings that are in the cache. `engine.py` uses
the scheduler, `pages.py` gives the pages.
"""

import operator
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from ..meshes import ServeError
from ..meshes.arguments import check_count, check_number
from ..meshes.errors import shown
from .constraints.constraint import Constraint
from .pages import PagePool

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""Why a sequence ended: a stop token or a complete constraint, its limit of tokens, `Engine.cancel`, or logits that are
not finite."""

MOST_BIASES = 300
"""The most tokens of a request that have a bias; OpenAI's API takes as many."""

MOST_LOGPROBS = 20
"""The most likeliest tokens of which a request gets log probabilities; OpenAI's API has as many."""

_MOST_BIAS = 100

_MAX_TEMPERATURE = 3.4e38
"""The largest temperature; a larger one would be infinite in float32."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt as token ids, and the settings for its answer.

    Args:
        prompt: token ids; a list or an array becomes a tuple, as does `stop`.
        max_new_tokens: most tokens of the answer.
        temperature: divisor of the logits before a draw; 0 takes the likeliest token.
        top_k: number of likeliest tokens to draw from; 0 for all.
        top_p: total probability of the likeliest tokens to draw from; 1 for all (Holtzman et al. 2020, section 3.1).
        min_p: least probability of a token to draw, as a share of that of the likeliest; 0 for all.
        repetition_penalty: divisor of positive logits, and factor of others, of tokens in prompt or answer; 1 for none.
        presence_penalty, frequency_penalty: taken from the logits of tokens in the answer, once and as often as they
            are there; 0 for none.
        logit_bias: what is added to the logits of tokens, as a mapping or pairs (token, bias); at most 300.
        logprobs: number of likeliest tokens whose log probabilities come with those of the answer, up to 20; 0 for
            those of the answer alone, None for none.
        seed: seed of the draws; it gives the same tokens on any mesh and beside any other requests.
        stop: token ids that end the answer and are not part of it.
        constraint: the form that the answer must have; the engine needs a tokenizer then.

    Raises:
        ServeError: the prompt is empty, a token is not a whole number, or a number is out of its range.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0
    stop: tuple[int, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "stop"):
            object.__setattr__(self, name, _read_tokens(name, getattr(self, name)))
        if not self.prompt:
            raise ServeError("a prompt is empty: there is nothing to continue.", fix="give at least one token.")
        for name in ("max_new_tokens", "top_k", "seed"):
            check_count(name, getattr(self, name), error=ServeError, least=1 if name == "max_new_tokens" else 0)
        for name in ("temperature", "top_p"):
            check_number(name, getattr(self, name), error=ServeError)
        object.__setattr__(self, "logit_bias", _read_biases(self.logit_bias))
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, error=ServeError, least=0)
        ranges = {
            "temperature": (
                self.temperature <= _MAX_TEMPERATURE,
                f"from 0 to {_MAX_TEMPERATURE:g}, what float32 holds",
            ),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (_is_within(self.min_p, 0, 1), "a number from 0 to 1"),
            "repetition_penalty": (_is_within(self.repetition_penalty, 0.01, 100), "a number from 0.01 to 100"),
            "presence_penalty": (_is_within(self.presence_penalty, -2, 2), "a number from -2 to 2"),
            "frequency_penalty": (_is_within(self.frequency_penalty, -2, 2), "a number from -2 to 2"),
            "logprobs": ((self.logprobs or 0) <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}"),
            "seed": (self.seed < 2**32, "from 0 to 4294967295"),
        }
        for name, (is_right, wanted) in ranges.items():
            if not is_right:
                raise ServeError(f"{name}={shown(getattr(self, name))} is out of range.", fix=f"give {wanted}.")

    @property
    def has_penalty(self) -> bool:
        """Whether tokens that the sequence has already are penalized."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


def _is_within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and least <= float(value) <= most


def _read_tokens(name: str, tokens: Any) -> tuple[int, ...]:
    """Return token ids as a tuple of Python integers."""
    try:
        return tuple(map(operator.index, tokens))
    except TypeError:
        shown = repr(tokens)
        raise ServeError(
            f"{name}={shown if len(shown) <= 60 else f'{shown[:57]}...'} are no token ids, which are whole numbers.",
            fix="encode a text with the tokenizer of the model.",
        ) from None


def _read_biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Return biases as pairs, of each token one."""
    try:
        pairs = given.items() if isinstance(given, Mapping) else given
        biases = {operator.index(token): float(bias) for token, bias in pairs}
    except (TypeError, ValueError):
        raise ServeError(
            f"logit_bias={shown(given)} are no pairs of a token and a number.", fix="give {token: bias}."
        ) from None
    if len(biases) > MOST_BIASES:
        raise ServeError(
            f"logit_bias has {len(biases)} tokens, and at most {MOST_BIASES} are taken.", fix="leave some out."
        )
    if wrong := [bias for bias in biases.values() if not abs(bias) <= _MOST_BIAS]:
        raise ServeError(f"logit_bias={wrong[0]} is out of range.", fix=f"give from -{_MOST_BIAS} to {_MOST_BIAS}.")
    return tuple(biases.items())


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The log probability of a token of an answer, and the likeliest tokens in its place with theirs, largest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(kw_only=True, eq=False)
class ServedSequence:
    """A request in the queue or in progress: its slot, None in the queue, and its answer so far.

    Args:
        pages: its pages of the cache.
        logprobs: one entry for each token of the answer, if the request wants them.
        num_read, num_shared: tokens of the prompt that are in the cache, and those that other sequences have read.
        num_guessed, num_accepted: tokens of the answer that speculation guessed, and those that were right.
        error: why it ended with "error", if its constraint did that.
    """

    id: int
    request: Request
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_read: int = 0
    num_shared: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_guessed: int = 0
    num_accepted: int = 0
    error: ServeError | None = None

    @property
    def is_read(self) -> bool:
        """Whether the prompt is read to its end."""
        return self.num_read == len(self.request.prompt)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of a sequence's prompt, which begins at position `start`."""

    sequence: ServedSequence
    start: int
    tokens: tuple[int, ...]

    @property
    def is_last(self) -> bool:
        """Whether the prompt ends here."""
        return self.start + len(self.tokens) == len(self.sequence.request.prompt)


class RequestScheduler:
    """A queue and slots: `num_shards` data shards with `groups` groups of `group_size` slots each.

    Args:
        num_pages, page: number of pages of each data shard, and of tokens of a page. Whoever submits a request has
            checked that it fits into them alone.
        long_from: as of `PagePool`.

    >>> scheduler = RequestScheduler(num_shards=1, groups=2, group_size=1, num_pages=16, page=8)
    >>> waiting = [scheduler.submit(Request(prompt=(1, 2, 3))) for _ in range(3)]
    >>> [sequence.slot for sequence in scheduler.admit()]
    [0, 1]
    """

    def __init__(
        self, *, num_shards: int, groups: int, group_size: int, num_pages: int, page: int, long_from: int = 0
    ) -> None:
        self.pools = [PagePool(num_pages=num_pages, page=page, long_from=long_from) for _ in range(num_shards)]
        self.num_shards, self.groups, self.group_size = num_shards, groups, group_size
        self.waiting: deque[ServedSequence] = deque()
        self.running: dict[int, ServedSequence] = {}
        # Admitted sequences whose prompts are not read to the end, for each data shard in the order of admission.
        self._reading: list[deque[ServedSequence]] = [deque() for _ in range(num_shards)]
        self._num_submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self.waiting and not self.running

    @property
    def num_free_pages(self) -> int:
        """Number of pages that no sequence has, over all data shards."""
        return sum(pool.num_free for pool in self.pools)

    @property
    def decoding(self) -> list[ServedSequence]:
        """The sequences that devices decode, with cancelled ones that devices have not ended yet."""
        return [sequence for sequence in self.running.values() if sequence.is_read]

    def submit(self, request: Request) -> ServedSequence:
        """Put a request at the end of the queue."""
        sequence = ServedSequence(id=self._num_submitted, request=request)
        self._num_submitted += 1
        self.waiting.append(sequence)
        return sequence

    def admit(self) -> list[ServedSequence]:
        """Give free slots and pages to waiting sequences in order, and return the admitted ones."""
        admitted = []
        while self.waiting and (place := self._find_place(self.waiting[0].request)) is not None:
            sequence = self.waiting.popleft()
            sequence.slot, sequence.pages = place
            self.running[sequence.slot] = sequence
            self._reading[self._shard(sequence.slot)].append(sequence)
            admitted.append(sequence)
        return admitted

    def take_chunks(self, *, size: int, limit: int) -> list[list[Chunk]]:
        """Return the next chunks to read on each data shard, at most `limit`, and mark them as read."""
        pools = zip(self.pools, self._reading, strict=True)
        return [list(self._take(pool, reading, size, limit)) for pool, reading in pools]

    def finish(self, sequence: ServedSequence, reason: FinishReason) -> None:
        """End a sequence, unless it was cancelled, and free its slot and pages."""
        sequence.finish_reason = sequence.finish_reason or reason
        self._free(sequence)

    def cancel(self, sequence: ServedSequence) -> None:
        """End a sequence with "cancelled"; one that is decoding keeps its slot until `finish`."""
        sequence.finish_reason = "cancelled"
        if sequence.slot is None:
            self.waiting.remove(sequence)
        elif not sequence.is_read:
            self._reading[self._shard(sequence.slot)].remove(sequence)
            self._free(sequence)

    def _free(self, sequence: ServedSequence) -> None:
        assert sequence.slot is not None
        assert self.running.pop(sequence.slot) is sequence
        pool = self.pools[self._shard(sequence.slot)]
        if sequence.finish_reason == "error":
            pool.forget(sequence.pages)
        pool.give_back(sequence.pages)
        sequence.pages = []

    def _shard(self, slot: int) -> int:
        return slot // (self.groups * self.group_size)

    def _find_place(self, request: Request) -> tuple[int, list[int]] | None:
        """Return a free slot and pages, or None.

        They are of the group with most free slots, since groups of equal size keep all stages busy; of several, where
        more of the prompt is in the cache.
        """
        free: dict[int, list[int]] = {}
        for first in range(0, self.num_shards * self.groups * self.group_size, self.group_size):
            if slots := [slot for slot in range(first, first + self.group_size) if slot not in self.running]:
                free[first] = slots

        # The last token of an answer is never read, so it is not cached.
        num_tokens = len(request.prompt) + request.max_new_tokens - 1

        def rank(first: int) -> tuple[int, int]:
            pool = self.pools[self._shard(first)]
            return -len(free[first]), -pool.num_shared(request.prompt, num_tokens=num_tokens)

        for first in sorted(free, key=rank):
            pages = self.pools[self._shard(first)].take(request.prompt, num_tokens=num_tokens)
            if pages is not None:
                return free[first][0], pages
        return None

    def _take(self, pool: PagePool, reading: deque[ServedSequence], size: int, limit: int) -> Iterable[Chunk]:
        """Yield at most `limit` chunks of `size` tokens of one data shard; a prompt that ends leaves the queue."""
        for _ in range(limit):
            if not reading:
                return
            sequence = reading[0]
            prompt = sequence.request.prompt
            # Not at admission: those before it in this queue have read since then, or were cancelled and have not.
            if not sequence.num_read:
                sequence.num_read = sequence.num_shared = pool.num_read(sequence.pages, prompt)
            chunk = Chunk(
                sequence=sequence,
                start=sequence.num_read,
                tokens=prompt[sequence.num_read : sequence.num_read + size],
            )
            # Counted before the devices have read it: the engine runs prefill right after.
            sequence.num_read += len(chunk.tokens)
            pool.mark_read(sequence.pages, num_tokens=sequence.num_read)
            if chunk.is_last:
                reading.popleft()
            yield chunk
