"""Judge each training step inside the jitted program, so that a bad loss never reaches the weights.

A step is bad if its loss or its gradient norm is not finite, or if its loss is a spike: more than `train.spike_ratio`
times the running mean of the losses before it. The host cannot judge it in time. When it reads the loss of step 7, step
8 is under way and has been given the state that step 7 left:

    host     | start 7 | read 6 | start 8 | read 7: nan, stop
    devices  |   ...   |      step 7      |      step 8       |
    state    |         good               | good, halted      | good, halted

So step 7 leaves the parameters as they were and sets `halted`, and step 8, halted, changes nothing.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..configs.run_config import TrainSection

_MEAN_DECAY = 0.98
"""Decay of the running mean of the loss, whose memory is about fifty steps."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepHealth:
    """The record of past steps by which the next one is judged, as replicated scalars.

    `skipped` int32[] counts the batches left out. `mean_loss` float32[] is the running mean of the other losses,
    infinite before the first. `halted` bool[] is set when a bad step stops the run; it is not saved, so that a
    resumed run starts again.
    """

    skipped: Any
    mean_loss: Any
    halted: Any


def initial_health() -> StepHealth:
    """Return the record of a run before its first step."""
    return StepHealth(
        skipped=jnp.zeros((), jnp.int32), mean_loss=jnp.full((), jnp.inf, jnp.float32), halted=jnp.zeros((), jnp.bool_)
    )


def is_good_step(health: StepHealth, *, loss: jax.Array, grad_norm: jax.Array, section: TrainSection) -> jax.Array:
    """Return whether a step with this loss and gradient norm may update the parameters, as bool[]."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~health.halted
    if section.spike_ratio:
        good &= loss <= section.spike_ratio * health.mean_loss
    return good


def next_health(health: StepHealth, *, good: jax.Array, loss: jax.Array, section: TrainSection) -> StepHealth:
    """Return the record after a step; a bad step is counted, or halts the run."""
    mean = jnp.where(jnp.isfinite(health.mean_loss), _MEAN_DECAY * health.mean_loss + (1 - _MEAN_DECAY) * loss, loss)
    skips = section.bad_step == "skip"
    return StepHealth(
        skipped=health.skipped + (~good).astype(jnp.int32) * jnp.int32(skips),
        mean_loss=jnp.where(good, mean, health.mean_loss),
        halted=health.halted if skips else ~good,
    )
