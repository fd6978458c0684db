"""Move the biases of routers once a step, so that all experts get as many tokens (Wang et al. 2024, algorithm 1).

An expert with fewer tokens than the mean of its layer gets a bias that is larger by `router_bias_rate`, one with more a
smaller one (DeepSeek-AI 2024, "V3", section 2.1.2). The bias takes part in the choice of experts alone, so its gradient
is zero and an optimizer leaves it as it is. Tokens are counted over the whole batch of a step.
"""

from typing import Any

import jax
import jax.numpy as jnp

_BIAS = ("router", "bias")


def move_biases(blocks: Any, tokens_LE: jax.Array, *, rate: float, is_good: jax.Array) -> Any:
    """Return parameters of blocks with moved biases [L, E]; unchanged where `is_good`, bool[], is false.

    Args:
        tokens_LE: tokens of each expert of each layer in a step, in the layout of the biases; of padding zeros.
        rate: by how much a bias moves.
    """
    move_LE = rate * jnp.sign(tokens_LE.mean(-1, keepdims=True) - tokens_LE)

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        is_bias = tuple(getattr(key, "key", None) for key in path[-2:]) == _BIAS
        # A select, not a product with 0: where the step is bad, counts may be NaN.
        return jnp.where(is_good, leaf + move_LE, leaf) if is_bias else leaf

    return jax.tree_util.tree_map_with_path(one, blocks)
