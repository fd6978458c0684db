"""Attention sinks: a learned score of each head that takes part in its softmax and has no value (OpenAI 2025, gpt-oss).

    share of key s     exp(score_s) / (sum over keys of exp(score) + exp(sink))

A query may so attend to nothing: its shares add up to less than 1. Every kernel of ours returns what the keys alone
give, y, and the logarithm L of their sum. With a sink b the sum is L' = log(exp(L) + exp(b)), and the output y x
exp(L - L'). The backward of each kernel reads y and L alone; given the new ones it is that of the softmax with sinks,
since the sink's value is 0. So no kernel knows of sinks, cuDNN's included. Read `../attention/flash.py` next.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import sum_like
from ..config import ModelConfig
from ..partitioning import INIT_STD, make_param


def make_sinks(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """Return the sinks of all heads [N@tensor], None (as flax's data) in a model without."""
    if config.attention_sinks == "off":
        return nnx.data(None)
    return make_param(rngs.params(), (config.num_heads,), ("heads",), std=INIT_STD, rules=rules)


def add_sinks(mixed: jax.Array, sums: jax.Array, sinks_N: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the output of attention with sinks and the logarithms of its sums, given those of the keys alone.

    mixed[..., T, N, H], sums[..., N, T], sinks[N] -> the same shapes; the share of the keys in float32.
    """
    whole = jnp.logaddexp(sums, _by_head(sinks_N, sums))
    share = jnp.swapaxes(jnp.exp(sums - whole), -1, -2)[..., None]
    return (mixed.astype(jnp.float32) * share).astype(mixed.dtype), whole


def sink_grads(grad: jax.Array, mixed: jax.Array, sums: jax.Array, sinks_N: jax.Array) -> jax.Array:
    """Return the gradient of sinks [N], from that of the output.

    grad and mixed[..., T, N, H], sums[..., N, T] with sinks. The gradient of a score is its share x (the gradient of
    the share - the mean of these over all shares); the sink's value, and with it the gradient of its share, is 0.

    Args:
        mixed, sums: as `add_sinks` returned them.
    """
    mean = jnp.swapaxes((grad.astype(jnp.float32) * mixed.astype(jnp.float32)).sum(-1), -1, -2)
    share = jnp.exp(_by_head(sinks_N, sums) - sums)
    of_heads = -(share * mean).sum((*range(sums.ndim - 2), sums.ndim - 1))
    return sum_like(of_heads.astype(sinks_N.dtype), sinks_N)


def _by_head(sinks_N: jax.Array, sums: jax.Array) -> jax.Array:
    """Return the sinks in the shape [1, ..., N, 1] of sums [..., N, T]."""
    return sinks_N.astype(jnp.float32).reshape(*[1] * (sums.ndim - 2), -1, 1)
