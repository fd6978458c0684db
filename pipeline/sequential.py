"""The path of a single pipeline rank: plain gradient accumulation over microbatches, one at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from .buffers import vary, zeros_for
from .ends import Wants
from .stack import natural_order
from .stage import PipelineParams, StageFns


def run_sequence(
    fns: StageFns, params: PipelineParams, batch: Any, *, wants: Wants
) -> tuple[jax.Array, PipelineParams | None]:
    """Return this device's share of the loss and its gradients; for use inside `shard_map` over data.

    params.stages[C, k, ...] whole, params.shared whole; batch leaves [M, b, ...] -> loss[]
    {U:data}, gradients {U:data}.
    """
    params, batch = jax.tree.map(vary, (params, batch))

    def loss_of(params: PipelineParams, microbatch: Any) -> jax.Array:
        def layer(x: jax.Array, own: Any) -> tuple[jax.Array, None]:
            return vary(fns.layer(own, x, microbatch)), None

        stages = jax.tree.map(lambda leaf: leaf[:, None], params.stages)
        layers = natural_order(stages, layers_per_stage=fns.layers_per_stage)
        x, _ = jax.lax.scan(layer, vary(fns.first(params.shared, microbatch)), layers)
        return vary(fns.last(params.shared, x, microbatch))

    def add(total: Any, microbatch: Any) -> tuple[Any, None]:
        if wants == "loss":
            return (total[0] + loss_of(params, microbatch), None), None
        loss, grads = jax.value_and_grad(loss_of)(params, microbatch)
        return (total[0] + loss, jax.tree.map(lambda t, g: t + g.astype(t.dtype), total[1], grads)), None

    zeros = jax.tree.map(zeros_for, params) if wants == "grads" else None
    return jax.lax.scan(add, (vary(jnp.zeros((), jnp.float32)), zeros), batch)[0]
