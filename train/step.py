"""One optimizer step and one validation, as jitted functions of a state and a batch."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax

from ..pipeline import pipeline_grads, pipeline_loss
from .state import Setup, TrainState

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Replicated float32 scalars of one step: loss, norm of the whole gradient before clipping, learning rate."""

    loss: jax.Array
    grad_norm: jax.Array
    lr: jax.Array


def make_train_step(setup: Setup) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return a jitted step (state, batch) -> (state, metrics) that consumes the state it is given.

    Batch leaves are [M, B@data, T]: tokens, targets, and weights that sum to 1. Gradients come from `pipeline_grads`;
    with ZeRO-1 each data rank then updates its own part, and the new parameters are gathered.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        out = pipeline_grads(
            setup.model.fns, params=state.params, batch=batch, mesh=setup.mesh, schedule=setup.schedule
        )
        grads = jax.lax.with_sharding_constraint(out.grads, setup.moment_shardings)
        metrics = StepMetrics(
            loss=out.loss, grad_norm=optax.tree.norm(grads), lr=jax.numpy.asarray(setup.learning_rate(state.step))
        )
        updates, opt_state = setup.optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    # Without out_shardings XLA may choose others for the new state, and the next step would compile again.
    return jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings, None))


def make_eval_step(setup: Setup) -> Callable[[TrainState, Batch], jax.Array]:
    """Return a jitted (state, batch) -> loss that runs forwards only."""

    def loss(state: TrainState, batch: Batch) -> jax.Array:
        return pipeline_loss(
            setup.model.fns, params=state.params, batch=batch, mesh=setup.mesh, schedule=setup.schedule
        )

    return jax.jit(loss)
