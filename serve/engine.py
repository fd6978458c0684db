"""An engine: a model on a mesh that answers many requests at once, each as if it were alone.

Requests come and go between calls of two compiled programs; none of them stops the others or compiles anything. Start
with `Engine.generate`; `submit` and `step` are for those who have requests that arrive one after another.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from jax.sharding import Mesh

from ..layers import ModelConfig, bytes_per_device
from ..layers.cache import CacheDtype
from ..meshes import ServeError
from ..meshes.arguments import check_choice, check_count
from ..meshes.switches import Switch, check_switches
from .check import check_model, check_request
from .decode import NOTHING, ticks_of_round
from .params import Layers, stage_params, stage_shapes
from .prefill import Chunks
from .programs import compile_programs
from .requests import Chunk, FinishReason, Request, Schedule, Sequence
from .sampling import Choice
from .state import MAX_STOPS, Fill, Sizes, empty_state, state_shapes

OnToken = Callable[[Sequence, int], None]
"""What is called with a sequence and each token it has just got, in order; it may have got more by then."""

_REASONS: dict[int, FinishReason] = {1: "stop", 2: "length", 3: "error"}


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a request got: its new tokens, without a stop token, and why it ended."""

    tokens: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Ticks of decoding so far, in how many of them each device row [P, data] had work, and ticks of prefill."""

    decode_ticks: int
    prefill_ticks: int
    busy: np.ndarray

    @property
    def idle_share(self) -> float:
        """Share of all ticks in which a stage had nothing to do, mean over stages: filling and emptying included."""
        ticks = self.decode_ticks + self.prefill_ticks
        return 1 - float(self.busy.mean()) / ticks if ticks else 0.0


class Engine:
    """Prefill, pipelined decode and continuous batching on any mesh.

    >>> engine = Engine(config, params, mesh=mesh, slots=4, max_tokens=128)
    >>> engine.generate([Request(prompt=(72, 105), max_new_tokens=8)])[0].tokens

    Args:
        params: natural order, as `param_shapes(config, mesh=mesh)` says; given up to the engine.
        slots: sequences at a time, over all data shards.
        max_tokens: tokens of a sequence, prompt and answer, at most; what the cache has room for.
        groups: parts of a data shard's slots that follow each other through the stages; as many as stages if left out.
        cache_dtype: of keys and values; the compute dtype if left out.
        chunk: tokens of a prompt that are read at once.
        chunks_per_step: chunks that a step reads at most before it decodes, so that long prompts do not stop others.
        layers: one loop over a rank's layers, or code for each; if left out, a loop on CPUs, where nothing is gained.
        rounds: tokens of each sequence that a step decodes at most before it looks at the queue.
        max_stops: stop tokens of a request at most.
        on_token: called with every new token as soon as the host has it.
        fill: "nan" poisons the cache before use, to prove that nothing of it leaks.

    Raises:
        TrellaxError: model, mesh and sizes do not fit each other; nothing was allocated.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        mesh: Mesh,
        slots: int = 8,
        max_tokens: int | None = None,
        groups: int | None = None,
        cache_dtype: CacheDtype | None = None,
        chunk: int = 64,
        chunks_per_step: int = 16,
        rounds: int = 8,
        max_stops: int = MAX_STOPS,
        layers: Layers | None = None,
        on_token: OnToken | None = None,
        fill: Fill = "zeros",
    ) -> None:
        _check_values(cache_dtype, layers, fill, chunks_per_step, max_stops)
        self.config, self.mesh, self.on_token = config, mesh, on_token
        self.sizes = sizes = Sizes(
            slots=slots,
            max_tokens=config.max_tokens if max_tokens is None else max_tokens,
            groups=mesh.shape["pipe"] if groups is None else groups,
            num_shards=mesh.shape["data"],
            chunk=chunk,
            items=chunks_per_step,
            rounds=rounds,
            stops=max_stops,
        )
        check_model(config, mesh.shape, max_tokens=sizes.max_tokens)
        self.layers: Layers = layers or ("loop" if mesh.devices.flat[0].platform == "cpu" else "unrolled")
        stored = cache_dtype or config.dtype
        self.shapes = state_shapes(config, sizes, mesh=mesh, cache_dtype=stored, layers=self.layers)
        self.programs = compile_programs(config, sizes, mesh=mesh, state=self.shapes, layers=self.layers)
        self.schedule = Schedule(num_shards=sizes.num_shards, groups=sizes.groups, group_size=sizes.group_size)
        self._params = stage_params(params, config=config, mesh=mesh, layers=self.layers)
        self._state = empty_state(self.shapes, fill=fill)
        self._choice = _empty_choice(sizes)
        self._decode_ticks = self._prefill_ticks = 0

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of keys, values and lengths that each device holds."""
        return bytes_per_device(self.shapes.cache)

    @property
    def param_bytes_per_device(self) -> int:
        """Bytes of parameters that each device holds."""
        return bytes_per_device(stage_shapes(self.config, mesh=self.mesh))

    @property
    def usage(self) -> Usage:
        """How busy the stages have been."""
        return Usage(
            decode_ticks=self._decode_ticks, prefill_ticks=self._prefill_ticks, busy=np.asarray(self._state.busy)
        )

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Return the answers to some requests, in their order; all of them are checked before any is run.

        Raises:
            ServeError: a request does not fit the cache or the vocabulary, or logits are not finite.
        """
        requests = list(requests)
        for request in requests:
            self._check(request)
        sequences = [self.submit(request) for request in requests]
        while any(sequence.finish_reason is None for sequence in sequences):
            self.step()
        return [Completion(tokens=tuple(s.tokens), finish_reason=s.finish_reason or "length") for s in sequences]

    def submit(self, request: Request) -> Sequence:
        """Put a request in the queue and return its sequence, which `step` fills.

        Raises:
            ServeError: it does not fit the cache or the vocabulary.
        """
        self._check(request)
        return self.schedule.submit(request)

    def step(self) -> list[Sequence]:
        """Admit requests, read some of their prompts, decode some tokens; return the sequences that ended.

        Raises:
            ServeError: the logits of a sequence are not finite; it ended with "error", and the others can go on.
        """
        for sequence in self.schedule.admit():
            self._write_choice(sequence)
        ended = self._read_prompts()
        return ended + self._decode()

    def _check(self, request: Request) -> None:
        check_request(request, self.config, max_tokens=self.sizes.max_tokens, max_stops=self.sizes.stops)

    def _read_prompts(self) -> list[Sequence]:
        chunks = self.schedule.take_chunks(size=self.sizes.chunk, limit=self.sizes.items)
        num_chunks = max(map(len, chunks))
        if not num_chunks:
            return []
        args = self._params, self._state, self._choice, self._pack(chunks), np.int32(num_chunks)
        self._state, said = self.programs.prefill(*args)
        self._prefill_ticks += num_chunks + self.mesh.shape["pipe"] - 1
        first = np.asarray(said)[-1]
        return self._note(
            (chunk.sequence, *first[shard, item].tolist())
            for shard, own in enumerate(chunks)
            for item, chunk in enumerate(own)
            if chunk.is_last
        )

    def _decode(self) -> list[Sequence]:
        decoding = {s.slot: s for s in self.schedule.decoding}
        if not decoding:
            return []
        longest = max(self._num_left(sequence) for sequence in decoding.values())
        num_rounds = min(self.sizes.rounds, longest)
        self._state, said = self.programs.decode(self._params, self._state, self._choice, np.int32(num_rounds))
        self._decode_ticks += num_rounds * ticks_of_round(self.sizes, self.mesh.shape["pipe"])
        return self._note(
            (decoding[slot], token, reason)
            for turn in np.asarray(said)[-1, :num_rounds]
            for slot, (token, reason) in enumerate(turn.tolist())
            if token != NOTHING
        )

    def _num_left(self, sequence: Sequence) -> int:
        """Rounds until a sequence ends: one more where its token may be between two stages."""
        return sequence.request.max_new_tokens - len(sequence.tokens) + (self.mesh.shape["pipe"] > 1)

    def _note(self, said: Iterable[tuple[Sequence, int, int]]) -> list[Sequence]:
        """Take note of tokens with their reasons to end, tell them, and return the sequences that ended."""
        heard, ended = [], []
        for sequence, token, reason in said:
            if _REASONS.get(reason) not in ("stop", "error"):
                sequence.tokens.append(token)
                heard.append((sequence, token))
            if reason:
                self.schedule.finish(sequence, _REASONS[reason])
                ended.append(sequence)
        # Told once all are noted: a listener that raises must not lose what the devices have gone on from.
        if self.on_token:
            for sequence, token in heard:
                self.on_token(sequence, token)
        for sequence in ended:
            if sequence.finish_reason == "error":
                raise _not_finite(sequence)
        return ended

    def _write_choice(self, sequence: Sequence) -> None:
        request, slot = sequence.request, sequence.slot
        self._choice.temperature[slot] = request.temperature
        self._choice.top_k[slot] = min(request.top_k, self.config.vocab_size)
        self._choice.top_p[slot] = request.top_p
        self._choice.seed[slot] = request.seed
        self._choice.limit[slot] = len(request.prompt) + request.max_new_tokens
        self._choice.stops[slot] = [*request.stop, *[-1] * (self.sizes.stops - len(request.stop))]

    def _pack(self, chunks: list[list[Chunk]]) -> Chunks:
        """Chunks as arrays; what is left over counts no tokens."""
        sizes = self.sizes
        shape = (sizes.num_shards, sizes.items)
        tokens = np.zeros((*shape, sizes.chunk), np.int32)
        slot, start, count = (np.zeros(shape, np.int32) for _ in range(3))
        is_last = np.zeros(shape, np.bool_)
        for s, own in enumerate(chunks):
            for i, chunk in enumerate(own):
                assert chunk.sequence.slot is not None
                tokens[s, i, : len(chunk.tokens)] = chunk.tokens
                slot[s, i] = chunk.sequence.slot % sizes.slots_per_shard
                start[s, i], count[s, i], is_last[s, i] = chunk.start, len(chunk.tokens), chunk.is_last
        return Chunks(tokens=tokens, slot=slot, start=start, count=count, is_last=is_last)


def _check_values(
    cache_dtype: CacheDtype | None, layers: Layers | None, fill: Fill, chunks_per_step: int, max_stops: int
) -> None:
    """Check jax's switches, and what `Sizes` would call by another name or does not hold."""
    check_switches(*get_args(Switch), error=ServeError)
    check_count("chunks_per_step", chunks_per_step, error=ServeError)
    check_count("max_stops", max_stops, error=ServeError)
    check_choice("cache_dtype", cache_dtype, (None, *get_args(CacheDtype)), error=ServeError)
    check_choice("layers", layers, (None, *get_args(Layers)), error=ServeError)
    check_choice("fill", fill, get_args(Fill), error=ServeError)


def _not_finite(sequence: Sequence) -> ServeError:
    return ServeError(
        f"after {len(sequence.tokens)} tokens of the answer to request {sequence.id} logits are NaN or infinite, so no "
        "token is the likeliest: a weight is not finite, or the type to compute in overflows.",
        fix="check where the weights come from, or serve them in float32.",
    )


def _empty_choice(sizes: Sizes) -> Choice:
    slots = sizes.slots
    return Choice(
        temperature=np.zeros(slots, np.float32),
        top_k=np.zeros(slots, np.int32),
        top_p=np.ones(slots, np.float32),
        seed=np.zeros(slots, np.uint32),
        limit=np.zeros(slots, np.int32),
        stops=np.full((slots, sizes.stops), -1, np.int32),
    )
