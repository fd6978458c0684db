"""Answer many requests at once with a model on a mesh; every answer is the one that its request would get alone.

Requests start and end between calls of two compiled programs (continuous batching, Yu et al. 2022, "Orca", section
3), so a new request neither stops the others nor compiles anything. Use `Engine.generate` for a list of requests, and
`submit` and `step` for requests that arrive one after another; `async_engine.py` steps an engine on a thread. A
request on its way:

    submit -> queue | admit -> prefill (chunks of the prompt) -> decode (rounds of tokens) | -> the slot is free
                    |                   one call of `step`; a long one takes several       |
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ..hub.text_stream import Tokenizer
from ..layers import ModelConfig, bytes_per_device
from ..layers.attention.cache import CacheDtype
from ..meshes import MeshAxes, ShardingRules, mesh_sizes
from ..meshes.axes import DEFAULT_AXES
from .check import check_model, check_request, check_values
from .chunks import pack_chunks
from .compiled_programs import compile_programs
from .constraints.masks import Constraints
from .decode import ticks_of_round
from .params import stage_params, stage_shapes, weights_of
from .processes.place import gather
from .requests import Request, RequestScheduler, ServedSequence
from .results import Completion, Place, Usage, complete, not_finite, on_host, record_tokens
from .sampling.choose import NOTHING, Choice
from .slots import empty_inputs, input_shapes, prompt_parts, write_inputs
from .speculation.speculate import Speculation, Speculator
from .stacks import LayerLoop, default_loop
from .state import MAX_STOPS, PAGE, Fill, Sizes, empty_state, state_shapes

OnToken = Callable[[ServedSequence, int], None]
"""A callback for each new token of a sequence, in order; the sequence may already hold later tokens."""


class Engine:
    """An inference engine on any mesh: prefill, pipelined decode and continuous batching.

    >>> engine = Engine(config, params, mesh=mesh, slots=4, max_tokens=128)
    >>> engine.generate([Request(prompt=(72, 105), max_new_tokens=8)])[0].tokens

    Args:
        params: parameters in natural order, as in `param_shapes(config, mesh=mesh)`, or from `quantize_params`; the
            engine donates them.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.
        slots: number of sequences in progress at a time, over all data shards.
        max_tokens: most tokens of a sequence, prompt and answer.
        cache_tokens: tokens for which the cache has pages, over all data shards; by default `slots` x `max_tokens`.
            With fewer, a request waits until there are pages for its prompt and its longest answer.
        page: number of tokens of a page, the unit in which prompts that begin alike share the cache.
        groups: number of parts of a data shard's slots, which follow each other through the stages; by default the
            number of stages.
        cache_dtype: dtype of keys and values; by default the compute dtype.
        chunk: number of prompt tokens in one tick of prefill.
        chunks_per_step: most chunks that a step reads before it decodes, so that long prompts do not delay others.
        layers: "loop" for one loop over a rank's layers, "unrolled" for separate code; by default "loop" on CPUs, where
            unrolling gains nothing, and "unrolled" elsewhere.
        rounds: most tokens of each sequence that a step decodes before it admits requests from the queue.
        max_stops: most stop tokens of a request.
        on_token: a callback for every new token.
        fill: "nan" fills the unused cache with NaN, to prove that it does not affect answers.
        speculation: how to guess tokens, so that a step may decode several of a sequence; the answers are the same.
        tokenizer: that of the model, for requests with a constraint.

    Raises:
        TrellaxError: model, mesh and sizes are incompatible; nothing was allocated.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        mesh: Mesh,
        axes: MeshAxes = DEFAULT_AXES,
        slots: int = 8,
        max_tokens: int | None = None,
        cache_tokens: int | None = None,
        page: int = PAGE,
        groups: int | None = None,
        cache_dtype: CacheDtype | None = None,
        chunk: int = 64,
        chunks_per_step: int = 16,
        rounds: int = 8,
        max_stops: int = MAX_STOPS,
        layers: LayerLoop | None = None,
        on_token: OnToken | None = None,
        fill: Fill = "zeros",
        speculation: Speculation | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_values(cache_dtype, layers, fill, chunks_per_step, max_stops)
        self.config, self.mesh, self.spec, self.on_token = config, mesh, mesh_sizes(mesh, axes=axes), on_token
        self.sizes = Sizes(
            slots=slots,
            max_tokens=config.max_tokens if max_tokens is None else max_tokens,
            groups=self.spec.pipe if groups is None else groups,
            num_shards=self.spec.data,
            chunk=chunk,
            items=chunks_per_step,
            rounds=rounds,
            stops=max_stops,
            page=page,
            cache_tokens=cache_tokens,
        )
        self.layers: LayerLoop = layers or default_loop(mesh)
        self.cache_dtype: CacheDtype = cache_dtype or config.dtype
        self._begin(params, fill=fill, speculation=speculation, tokenizer=tokenizer)

    def _begin(self, params: Any, *, fill: Fill, speculation: Speculation | None, tokenizer: Tokenizer | None) -> None:
        """Check the model, compile, take the parameters, and allocate a state in which no slot is in use."""
        check_model(self.config, self.mesh.shape, max_tokens=self.sizes.max_tokens, axes=self.axes)
        own: dict[str, Any] = {"mesh": self.mesh, "layers": self.layers, "axes": self.axes}
        self.shapes = state_shapes(self.config, self.sizes, cache_dtype=self.cache_dtype, **own)
        own["weights"] = self.weights = weights_of(params)
        self.programs = compile_programs(self.config, self.sizes, state=self.shapes, **own)
        self._speculator: Speculator | None = None
        if speculation is not None:
            self._speculator = Speculator(speculation, self.config, self.sizes, state=self.shapes, **own)
        self.scheduler = _make_scheduler(self.sizes, self.config)
        self._params = stage_params(params, config=self.config, **own)
        self._state, self._slots = empty_state(self.shapes, fill=fill), empty_inputs(self.sizes)
        rules, vocab_size = ShardingRules.of(self.axes), self.config.vocab_size
        inputs = input_shapes(self.sizes, vocab_size=vocab_size, mesh=self.mesh, rules=rules)
        self.constraints = Constraints(tokenizer, vocab_size=vocab_size, shape=inputs.allowed)
        self._decode_ticks = self._prefill_ticks = self._read_tokens = self._shared_tokens = 0

    @property
    def axes(self) -> MeshAxes:
        """The roles of the mesh's axes."""
        return self.spec.roles

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of the cache (keys, values and lengths) on each device."""
        return bytes_per_device(self.shapes.cache)

    @property
    def param_bytes_per_device(self) -> int:
        """Bytes of parameters on each device."""
        return bytes_per_device(stage_shapes(self.config, mesh=self.mesh, axes=self.axes, weights=self.weights))

    @property
    def draft_bytes_per_device(self) -> int:
        """Bytes of a draft model with its cache on each device; 0 without one."""
        return self._speculator.bytes_per_device if self._speculator else 0

    @property
    def guessed_tokens(self) -> int:
        """Tokens that speculation has guessed so far."""
        return self._speculator.num_guessed if self._speculator else 0

    @property
    def accepted_tokens(self) -> int:
        """Those of them that were right."""
        return self._speculator.num_accepted if self._speculator else 0

    @property
    def usage(self) -> Usage:
        """Ticks so far, and how many of them each rank worked; with several processes, all must ask."""
        return Usage(
            decode_ticks=self._decode_ticks,
            prefill_ticks=self._prefill_ticks,
            read_tokens=self._read_tokens,
            shared_tokens=self._shared_tokens,
            guessed_tokens=self.guessed_tokens,
            accepted_tokens=self.accepted_tokens,
            busy=gather(self._state.busy),
        )

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Answer requests, and return their completions in order; all are checked before the first one starts.

        Raises:
            ServeError: a request does not fit the cache or the vocabulary, or logits are not finite.
        """
        requests = list(requests)
        for request in requests:
            self.check(request)
        sequences = [self.submit(request) for request in requests]
        while any(sequence.finish_reason is None for sequence in sequences):
            self.step()
        return [complete(sequence) for sequence in sequences]

    def submit(self, request: Request) -> ServedSequence:
        """Put a request in the queue, and return its sequence, to which `step` adds tokens.

        Raises:
            ServeError: it does not fit the cache or the vocabulary.
        """
        self.check(request)
        return self.scheduler.submit(request)

    def cancel(self, sequence: ServedSequence) -> None:
        """End a sequence with "cancelled", between two steps; its slot is free again after the next one.

        An ended sequence stays as it is.
        """
        if sequence.finish_reason is None:
            self.scheduler.cancel(sequence)
            self._end_on_devices(sequence)

    def _end_on_devices(self, sequence: ServedSequence) -> None:
        """Let devices that decode a sequence end it at its next token, also one that is between two stages."""
        if sequence.slot is not None:
            self._slots.settings.limit[sequence.slot] = 0

    def step(self) -> list[ServedSequence]:
        """Admit requests, read chunks of prompts, decode tokens, and return the sequences that ended.

        Raises:
            ServeError: the logits of a sequence are not finite, or its constraint takes too much work; it ended with
                "error", and the others can continue.
        """
        # Before prefill, which chooses the first token by these settings.
        for sequence in self.scheduler.admit():
            write_inputs(self._slots, sequence, vocab_size=self.config.vocab_size)
            if sequence.request.has_penalty:
                self._count_prompt(sequence)
            self.constraints.begin(sequence)
        ended = self._read_prompts()
        return ended + self._decode()

    def check(self, request: Request) -> None:
        """Raise unless a request fits the engine.

        Raises:
            ServeError: it does not fit the cache or the vocabulary, has too many stop tokens, or has a constraint that
                does not compile.
        """
        check_request(request, self.config, max_tokens=self.sizes.max_tokens, max_stops=self.sizes.stops)
        if request.constraint is not None:
            self.constraints.check(request.constraint, stop=request.stop)

    def _count_prompt(self, sequence: ServedSequence) -> None:
        """Let the devices count the tokens of a prompt, also of a beginning that they will not read again."""
        for part in prompt_parts(self.sizes, sequence):
            self._state = replace(self._state, seen=self.programs.note_prompt(self._state.seen, part))

    def _read_prompts(self) -> list[ServedSequence]:
        """Run prefill on the next chunks, and return the sequences that their first token ends."""
        chunks = self.scheduler.take_chunks(size=self.sizes.chunk, limit=self.sizes.items)
        num_chunks = max(map(len, chunks))
        if not num_chunks:
            return []
        given = self.constraints.place(self._slots), pack_chunks(self.sizes, chunks), np.int32(num_chunks)
        self._state, chosen = self.programs.prefill(self._params, self._state, *given)
        if self._speculator is not None:
            self._speculator.read(*given)
        self._read_tokens += sum(len(chunk.tokens) for own in chunks for chunk in own)
        self._shared_tokens += sum(chunk.sequence.num_shared for own in chunks for chunk in own if chunk.is_last)
        # Chunk i is on rank r in tick i + r.
        self._prefill_ticks += num_chunks + self.spec.pipe - 1
        places = (
            (chunk.sequence, (shard, item))
            for shard, own in enumerate(chunks)
            for item, chunk in enumerate(own)
            if chunk.is_last
        )
        return self._record(places, on_host(chosen))

    def _decode(self) -> list[ServedSequence]:
        """Run some rounds of decode, and return the sequences that ended."""
        # By slot, as the devices return tokens; no slot gets another sequence before the next step.
        decoding = {s.slot: s for s in self.scheduler.decoding if s.slot is not None}
        if not decoding:
            return []
        slots = self.constraints.place(self._slots)
        if self._speculator is not None:
            run = self._params, self._state, slots, decoding
            self._state, host, accepted = self._speculator.run(*run)
            self._decode_ticks += self._speculator.num_ticks
            return self._record(accepted, host)
        longest = max(self._num_left(sequence) for sequence in decoding.values())
        # In one round a slot gets one token at most, also with stages.
        most = 1 if self.constraints.has_any(decoding.values()) else self.sizes.rounds
        num_rounds = min(most, longest)
        self._state, chosen = self.programs.decode(self._params, self._state, slots, np.int32(num_rounds))
        self._decode_ticks += num_rounds * ticks_of_round(self.sizes, self.spec.pipe)
        host = on_host(chosen)
        turns, slots = np.nonzero(host.token[:num_rounds] != NOTHING)
        places = ((decoding[slot], (turn, slot)) for turn, slot in zip(turns.tolist(), slots.tolist(), strict=True))
        return self._record(places, host)

    def _num_left(self, sequence: ServedSequence) -> int:
        """Return the rounds until a sequence ends: one more on several stages, where its token may be between two."""
        return sequence.request.max_new_tokens - len(sequence.tokens) + (self.spec.pipe > 1)

    def _record(self, places: Iterable[tuple[ServedSequence, Place]], chosen: Choice) -> list[ServedSequence]:
        """Add chosen tokens to their sequences, call `on_token`, and return the sequences that ended."""
        added, ended = record_tokens(self.scheduler, places, chosen)
        for sequence in self.constraints.advance(added):
            if sequence not in ended:
                self._end_on_devices(sequence)
                ended.append(sequence)
        # Only after all tokens are stored: the devices have moved on, and a callback may raise.
        self._tell(added)
        for sequence in ended:
            if sequence.finish_reason == "error":
                raise sequence.error or not_finite(sequence)
        return ended

    def _tell(self, added: list[ServedSequence]) -> None:
        """Call `on_token` for the new tokens of sequences, which are listed once for each."""
        # Read once: another thread may take the callback away while this one calls it.
        if on_token := self.on_token:
            num_left = Counter(added)
            for sequence in added:
                on_token(sequence, sequence.tokens[-num_left[sequence]])
                num_left[sequence] -= 1


def _make_scheduler(sizes: Sizes, config: ModelConfig) -> RequestScheduler:
    return RequestScheduler(
        num_shards=sizes.num_shards,
        groups=sizes.groups,
        group_size=sizes.group_size,
        num_pages=sizes.pages_per_shard,
        page=sizes.page,
        long_from=config.rope_original_tokens if config.rope_scaling == "longrope" else 0,
    )
