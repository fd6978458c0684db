"""What is done to logits between their product and the softmax: a factor (Granite), a soft cap (Gemma 2)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..attention.blockwise import cap_scores
from ..config import ModelConfig


class LogitShape(NamedTuple):
    """The function of every logit s: c tanh(scale x s / c) for a cap c, scale x s without one (0)."""

    scale: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> "LogitShape":
        """Return that of a model."""
        return cls(scale=config.logit_scale, cap=config.logit_softcap)

    def apply(self, logits_BTV: jax.Array) -> jax.Array:
        """Return the function of float32 logits."""
        return cap_scores(logits_BTV if self.scale == 1 else logits_BTV * self.scale, self.cap)

    def return_grad(self, grad_BTV: jax.Array, logits_BTV: jax.Array) -> jax.Array:
        """Return the gradient of the product's logits, given that of the results `logits_BTV` of `apply`."""
        if self.cap:
            grad_BTV = grad_BTV * (1 - jnp.square(logits_BTV / self.cap))
        return grad_BTV if self.scale == 1 else grad_BTV * self.scale


PLAIN_LOGITS = LogitShape()
"""The logits as they are."""
