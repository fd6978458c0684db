"""One optimizer step and one validation, as jitted functions of a state and a batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..pipeline import pipeline_grads, pipeline_loss
from .health import is_good, next_health
from .optimizer import make_learning_rate, make_optimizer
from .state import Setup, TrainState

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Replicated scalars of one step: loss, norm of the whole gradient before clipping, learning rate, all float32.

    `taken` is false where loss or gradient were bad and the update was left out. `mean_loss` is what the loss was
    compared with: the running mean of the good losses before it, infinite before the first.
    """

    loss: jax.Array
    grad_norm: jax.Array
    lr: jax.Array
    taken: jax.Array
    mean_loss: jax.Array


def make_train_step(setup: Setup) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return a jitted step (state, batch, peak_rate) -> (state, metrics) that consumes the state it is given.

    The peak of the learning rate, `setup.peak_rate`, is an input so that runs of several rates share one compiled
    program; left out, it is the config's as a constant.

    Batch leaves are [M, B@data, T]: tokens, targets, and weights that sum to 1. Gradients come from `pipeline_grads`;
    with ZeRO-1 each data rank then updates its own part, and the new parameters are gathered. A bad step (`health.py`)
    leaves parameters and optimizer as they were.
    """
    section, optimizer_section = setup.config.train, setup.config.optimizer

    def step(state: TrainState, batch: Batch, peak_rate: jax.Array | None = None) -> tuple[TrainState, StepMetrics]:
        out = pipeline_grads(
            setup.model.fns, params=state.params, batch=batch, mesh=setup.mesh, schedule=setup.schedule
        )
        grads = jax.lax.with_sharding_constraint(out.grads, setup.moment_shardings)
        grad_norm = optax.tree.norm(grads)
        good = is_good(state.health, loss=out.loss, grad_norm=grad_norm, section=section)
        # optax mixes counts with floats: jax_numpy_dtype_promotion="strict" is not for its code.
        with jax.numpy_dtype_promotion("standard"):
            rate = make_learning_rate(optimizer_section, steps=section.steps, peak=peak_rate)
            lr = jnp.asarray(rate(state.step - state.health.skipped))
            optimizer: Any = make_optimizer(optimizer_section, steps=section.steps, peak=peak_rate)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # The old value goes through untouched, bit by bit, where the step is bad.
        params = jax.tree.map(lambda p, u: jnp.where(good, p + u, p), state.params, updates)
        opt_state = jax.tree.map(lambda new, old: jnp.where(good, new, old), opt_state, state.opt_state)
        moves_on = 1 if section.bad_step == "skip" else good.astype(jnp.int32)
        mean_loss = state.health.mean_loss
        health = next_health(state.health, good=good, loss=out.loss, section=section)
        state = TrainState(step=state.step + moves_on, params=params, opt_state=opt_state, health=health)
        return state, StepMetrics(loss=out.loss, grad_norm=grad_norm, lr=lr, taken=good, mean_loss=mean_loss)

    # Without out_shardings XLA may choose others for the new state, and the next step would compile again.
    return jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings, None))


def make_eval_step(setup: Setup) -> Callable[[TrainState, Batch], jax.Array]:
    """Return a jitted (state, batch) -> loss that runs forwards only."""

    def loss(state: TrainState, batch: Batch) -> jax.Array:
        return pipeline_loss(
            setup.model.fns, params=state.params, batch=batch, mesh=setup.mesh, schedule=setup.schedule
        )

    return jax.jit(loss)
