"""Decode with guesses: several tokens of a sequence for one reading of the weights, where guesses are right.

    guess (look-up on the host, or a draft model) -> verify, one pass on the devices -> take what is right, and one more

Answers are those without guesses (see `verify.py`). It pays where decoding waits for memory: few sequences, and text
that repeats its prompt (look-up), or a draft model that is much smaller and often right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...layers import ModelConfig
from ...layers.quantized import Weights
from ...meshes import MeshAxes, ServeError, ShardingRules, mesh_sizes
from ...meshes.arguments import check_count
from ...pipeline.model.trees import on_mesh
from ..compiled_programs import compile_program
from ..experts import with_room
from ..params import stage_shapes
from ..requests import ServedSequence
from ..results import Place, on_host
from ..sampling.choose import Choice
from ..slots import SlotInputs, input_shapes
from ..stacks import LayerLoop
from ..stage import Stage
from ..state import ServeState, Sizes
from .draft import DraftModel
from .lookup import LookUp
from .verify import Guesses, guess_shapes, no_guesses, verify

MOST_TOKENS = 64
"""The most guesses of a sequence at a time."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """How the next tokens of sequences are guessed: by look-up in what they say already, or by a draft model.

    Args:
        tokens: most guesses of a sequence at a time.
        draft: config and parameters of a draft model of the same vocabulary, as of an `Engine`; None for look-up.

    Raises:
        ServeError: `tokens` is no count, or above 64.
    """

    tokens: int = 4
    draft: tuple[ModelConfig, Any] | None = None

    def __post_init__(self) -> None:
        check_count("tokens", self.tokens, error=ServeError)
        if self.tokens > MOST_TOKENS:
            raise ServeError(f"tokens={self.tokens} guesses at a time are many.", fix=f"give {MOST_TOKENS} or fewer.")

    def check(self, config: ModelConfig) -> None:
        """Raise unless the draft model, if there is one, has the vocabulary of the model.

        Raises:
            ServeError: it has another.
        """
        if self.draft is not None and self.draft[0].vocab_size != config.vocab_size:
            raise ServeError(
                f"the draft model has a vocabulary of {self.draft[0].vocab_size}, and the model one of "
                f"{config.vocab_size}: their tokens are not the same.",
                fix="take a smaller model of the same family.",
            )


class Speculator:
    """The guesses of an engine, and the program that checks them."""

    def __init__(
        self,
        how: Speculation,
        config: ModelConfig,
        sizes: Sizes,
        *,
        state: ServeState,
        mesh: Mesh,
        axes: MeshAxes,
        layers: LayerLoop,
        weights: Weights,
    ) -> None:
        how.check(config)
        self.num_guessed = self.num_accepted = 0
        self.num_ticks = sizes.groups + mesh.shape[axes.pipe] - 1
        self._num_tokens, self._sizes = how.tokens, sizes
        self._looked_up: dict[ServedSequence, LookUp] = {}
        own: dict[str, Any] = {"mesh": mesh, "axes": axes, "layers": layers}
        self._draft: DraftModel | None = None
        if how.draft is not None:
            self._draft = DraftModel(*how.draft, sizes=sizes, num_tokens=how.tokens, **own)
        self._verify = _compile(config, sizes, how.tokens + 1, state=state, weights=weights, **own)

    @property
    def bytes_per_device(self) -> int:
        """Bytes of a draft model with its state on each device; 0 without one."""
        return self._draft.bytes_per_device if self._draft else 0

    def read(self, *chunks: Any) -> None:
        """Let a draft model read the chunks of prompts that the model reads."""
        if self._draft is not None:
            self._draft.read(*chunks)

    def run(
        self, params: Any, state: ServeState, slots: SlotInputs, decoding: Mapping[int, ServedSequence]
    ) -> tuple[ServeState, Choice, list[tuple[ServedSequence, Place]]]:
        """Guess and check once for all sequences; return the state, what was chosen, and the places of new tokens.

        Args:
            decoding: the sequences to decode, by slot.
        """
        guesses = self._guess(slots, decoding)
        state, chosen = self._verify(params, state, slots, guesses)
        host = on_host(chosen)
        places: list[tuple[ServedSequence, Place]] = []
        for slot, sequence in decoding.items():
            read, count = guesses.tokens[slot], int(guesses.counts[slot])
            num_right = 0
            # A choice that ends the sequence is the last one, though the guess behind it be right.
            while num_right + 1 < count and not host.reason[slot, num_right]:
                if host.token[slot, num_right] != read[num_right + 1]:
                    break
                num_right += 1
            places += [(sequence, (slot, place)) for place in range(num_right + 1)]
            sequence.num_guessed += count - 1
            sequence.num_accepted += num_right
            self.num_guessed, self.num_accepted = self.num_guessed + count - 1, self.num_accepted + num_right
        return state, host, places

    def _guess(self, slots: SlotInputs, decoding: Mapping[int, ServedSequence]) -> Guesses:
        """Return what the model reads of each slot: its last token and guesses."""
        guesses = no_guesses(self._sizes, num_tokens=self._num_tokens + 1)
        room = {}
        for slot, sequence in decoding.items():
            guesses.tokens[slot, 0], guesses.counts[slot] = sequence.tokens[-1], 1
            guesses.starts[slot] = len(sequence.request.prompt) + len(sequence.tokens) - 1
            # What may be chosen depends on each token before with a penalty or a constraint; a cancelled sequence ends
            # with its next token.
            goes_by_one = sequence.request.has_penalty or sequence.request.constraint is not None
            if not goes_by_one and sequence.finish_reason is None:
                room[slot] = min(self._num_tokens, sequence.request.max_new_tokens - len(sequence.tokens) - 1)
        found = self._by_draft(slots, guesses, room) if self._draft else self._by_look_up(decoding, room)
        for slot, tokens in found.items():
            guesses.tokens[slot, 1 : 1 + len(tokens)] = tokens
            guesses.counts[slot] += len(tokens)
        return guesses

    def _by_look_up(self, decoding: Mapping[int, ServedSequence], room: dict[int, int]) -> dict[int, list[int]]:
        # Those that have ended are forgotten.
        self._looked_up = {one: self._looked_up.get(one) or LookUp() for one in decoding.values()}
        found = {}
        for slot, count in room.items():
            sequence = decoding[slot]
            own, prompt = self._looked_up[sequence], sequence.request.prompt
            if not own.num_tokens:
                own.add(prompt)
            own.add(sequence.tokens[own.num_tokens - len(prompt) :])
            found[slot] = own.guess(count) if count > 0 else []
        return found

    def _by_draft(self, slots: SlotInputs, guesses: Guesses, room: dict[int, int]) -> dict[int, list[int]]:
        assert self._draft is not None
        is_open = np.zeros(self._sizes.slots, np.bool_)
        is_open[[slot for slot, count in room.items() if count > 0]] = True
        if not is_open.any():
            return {}
        drawn = self._draft.guess(slots, tokens=guesses.tokens[:, 0], starts=guesses.starts, is_open=is_open)
        found = {}
        for slot, count in room.items():
            own = drawn[: max(count, 0), slot].tolist()
            found[slot] = own[: next((place for place, token in enumerate(own) if token < 0), len(own))]
        return found


def _compile(
    config: ModelConfig,
    sizes: Sizes,
    num_tokens: int,
    *,
    state: ServeState,
    mesh: Mesh,
    axes: MeshAxes,
    layers: LayerLoop,
    weights: Weights,
) -> Any:
    """Compile the program that checks guesses; it donates the state and returns it."""
    rules = ShardingRules.of(axes)
    own: dict[str, Any] = {"axes": axes, "layers": layers, "weights": weights}
    sharers = mesh_sizes(mesh, axes=own["axes"]).expert
    stage = Stage(with_room(config, num_tokens=sharers * sizes.group_size * num_tokens), mesh, **own)
    shapes = (
        stage_shapes(config, mesh=mesh, **own),
        state,
        input_shapes(sizes, vocab_size=config.vocab_size, mesh=mesh, rules=rules),
        guess_shapes(sizes, num_tokens=num_tokens, mesh=mesh, rules=rules),
    )

    def run(params: Any, state: ServeState, slots: SlotInputs, guesses: Guesses) -> Any:
        return verify(state, stage=stage, sizes=sizes, params=params, slots=slots, guesses=guesses)

    return compile_program(run, mesh, shapes, P(*on_mesh(rules.spec(("stage", "batch")), mesh)))
