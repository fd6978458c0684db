"""Whether a step is good: a loss that is not finite, or far above its mean, must not reach the weights.

It is decided inside the jitted step, since the state from before is given away to the step that follows. Read `step.py`
next.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..configs.run_config import TrainSection

_MEMORY = 0.98
"""Of the running mean of the loss: about fifty steps."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Health:
    """What is remembered of past steps, as scalars on every device.

    `skipped` int32 batches were left out, `mean_loss` float32 is the running mean of the others' loss (infinite before
    the first). `halted` says that a bad step has stopped the run: every step after it changes nothing, so the state
    stays the last good one although the next step is already under way. It is not saved.
    """

    skipped: Any
    mean_loss: Any
    halted: Any


def healthy() -> Health:
    """Return the health of a run before its first step."""
    return Health(
        skipped=jnp.zeros((), jnp.int32), mean_loss=jnp.full((), jnp.inf, jnp.float32), halted=jnp.zeros((), jnp.bool_)
    )


def is_good(health: Health, *, loss: jax.Array, grad_norm: jax.Array, section: TrainSection) -> jax.Array:
    """Return whether the update of this loss and gradient norm may be taken."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~health.halted
    if section.spike_ratio:
        good &= loss <= section.spike_ratio * health.mean_loss
    return good


def next_health(health: Health, *, good: jax.Array, loss: jax.Array, section: TrainSection) -> Health:
    """Return the health after a step: a bad one is counted, or halts the run."""
    mean = jnp.where(jnp.isfinite(health.mean_loss), _MEMORY * health.mean_loss + (1 - _MEMORY) * loss, loss)
    skips = section.bad_step == "skip"
    return Health(
        skipped=health.skipped + (~good).astype(jnp.int32) * jnp.int32(skips),
        mean_loss=jnp.where(good, mean, health.mean_loss),
        halted=health.halted if skips else ~good,
    )
