"""The constraints of the answers in an engine's slots: after each token the host tells the devices what may follow.

An answer that is constrained goes on by one token a step, since the tokens that may come next depend on the last. The
bits of the tokens are data, so a constraint compiles nothing on the devices, and while no slot has one they are an
array that stays there. Every process of a server follows the same tokens, so nothing more is sent between processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from ...hub.text_stream import Tokenizer
from ...meshes import ServeError
from ...meshes.errors import shown
from ..requests import ServedSequence
from ..slots import SlotInputs
from .constraint import Constraint
from .grammars import Grammars, Matcher


class Constraints:
    """The matchers of the slots that have a constraint.

    Args:
        shape: shape and sharding of the bits, `SlotInputs.allowed`.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, vocab_size: int, shape: jax.ShapeDtypeStruct) -> None:
        self._grammars = Grammars(tokenizer, vocab_size=vocab_size) if tokenizer else None
        self._matchers: dict[ServedSequence, Matcher] = {}
        self._rows = np.zeros(shape.shape, np.uint32)
        self._unused = jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()

    def open(self) -> None:
        """Read the texts of the tokens, which takes a second for a large vocabulary; the first constraint would.

        Raises:
            ServeError: the library is missing, or cannot read the tokenizer; or the engine has none.
        """
        self._require().open()

    def compile(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the beginning of an answer, compiled once.

        Raises:
            ServeError: as `Grammars.matcher`; or the engine has no tokenizer.
        """
        return self._require().matcher(constraint)

    def _require(self) -> Grammars:
        if self._grammars is None:
            raise ServeError(
                "an answer with a constraint needs the texts of tokens, and this engine has no tokenizer.",
                fix="make it with Engine(..., tokenizer=tokenizer).",
            )
        return self._grammars

    def check(self, constraint: Constraint, *, stop: Sequence[int]) -> None:
        """Raise unless a constraint compiles, and a token that is no stop can begin the answer.

        Raises:
            ServeError: as `compile`; or no token can.
        """
        if not self.compile(constraint).write_mask(np.zeros_like(self._rows[0]), stop=stop):
            raise ServeError(
                f"stop={shown(stop)} are all the tokens that can begin an answer that has the form.",
                fix="leave them out.",
            )

    def begin(self, sequence: ServedSequence) -> None:
        """Begin with a sequence that was admitted, before its prompt is read."""
        if sequence.request.constraint is not None:
            self._matchers[sequence] = self.compile(sequence.request.constraint)
            self._write(sequence)

    def has_any(self, sequences: Iterable[ServedSequence]) -> bool:
        """Return whether one of these sequences may go on by one token alone."""
        return any(sequence in self._matchers for sequence in sequences)

    def place(self, slots: SlotInputs) -> SlotInputs:
        """Return the inputs of a call, with the bits of now if a slot needs them."""
        self._matchers = {one: own for one, own in self._matchers.items() if one.finish_reason is None}
        is_constrained = slots.settings.is_constrained
        is_constrained[:] = False
        is_constrained[[sequence.slot for sequence in self._matchers]] = True
        return replace(slots, allowed=self._rows if self._matchers else self._unused)

    def advance(self, added: Iterable[ServedSequence]) -> list[ServedSequence]:
        """Follow the new token of each sequence; return those whose answer is complete or cannot go on."""
        return [own for own in added if own in self._matchers and self._follow(own)]

    def _follow(self, sequence: ServedSequence) -> bool:
        """Go on by the last token, and return whether this has ended the sequence."""
        matcher = self._matchers[sequence]
        if sequence.finish_reason is None:
            matcher.advance(sequence.tokens[-1])
            if matcher.is_done:
                sequence.finish_reason = "stop"
            else:
                self._write(sequence)
        return sequence.finish_reason is not None and self._matchers.pop(sequence, None) is not None

    def _write(self, sequence: ServedSequence) -> None:
        """Write the bits of what may follow; where nothing may, end the sequence."""
        matcher = self._matchers[sequence]
        try:
            if matcher.write_mask(self._rows[sequence.slot], stop=sequence.request.stop):
                return
            if not matcher.may_end:
                raise ServeError(
                    f"after {len(sequence.tokens)} tokens no token of this model can continue an answer of this form.",
                    fix="allow letters that the model writes.",
                )
            # It may end here, and has no token that says so.
            sequence.finish_reason = "stop"
        except ServeError as error:
            sequence.finish_reason, sequence.error = "error", error
