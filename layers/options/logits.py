"""What is done to logits between their product and the softmax: a factor (Granite), a soft cap (Gemma 2), padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..attention.blockwise import cap_scores
from ..config import ModelConfig
from ..vocabulary import hide_padding


class LogitShape(NamedTuple):
    """The function of every logit s: c tanh(scale x s / c) for a cap c, scale x s without one (0).

    Columns behind the last of `words` are padding and get the least float32 (`../vocabulary.py`); None: there are none.
    """

    scale: float = 1.0
    cap: float = 0.0
    words: int | None = None

    @classmethod
    def of(cls, config: ModelConfig) -> "LogitShape":
        """Return that of a model."""
        return cls(scale=config.logit_scale, cap=config.logit_softcap, words=config.vocab_size)

    def apply(self, logits_BTV: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """Return the function of float32 logits[B, T, V@axes]."""
        logits_BTV = cap_scores(logits_BTV if self.scale == 1 else logits_BTV * self.scale, self.cap)
        return logits_BTV if self.words is None else hide_padding(logits_BTV, self.words, axes)

    def return_grad(self, grad_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
        """Return the gradient of the product's logits, given that of the results `logits_BTV` of `apply`."""
        if self.cap:
            # No capped logit is below -cap but those of padding, whose square would be infinite.
            grad_BTV = grad_BTV * (1 - jnp.square(jnp.maximum(logits_BTV, -self.cap) / self.cap))
        return grad_BTV if self.scale == 1 else grad_BTV * self.scale


PLAIN_LOGITS = LogitShape()
"""The logits as they are."""
