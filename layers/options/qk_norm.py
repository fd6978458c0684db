"""RMSNorms of queries and keys: over the features of each head, or over those of all heads together.

    "on"       each head      [B, T, N, H] over H             scale [H]        Qwen 3, Gemma 3
    "whole"    all heads      [B, T, N, H] over N and H       scale [N H]      OLMo 2

Where heads are split over tensor, a norm over all of them sums squares over its devices: one all-reduce of two numbers
a token, for queries and keys together. The scale is split as the heads are. Read `../attention.py` next.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ...meshes.device_axes import num_blocks, num_manual_blocks
from ..collectives import own_columns, run_in_blocks, sum_blocks
from ..config import ModelConfig
from ..norms import Norm, make_head_norm, normalize
from ..partitioning import param_metadata


class WholeNorm(nnx.Module):
    """The scale of an RMSNorm over the features of all heads, [N H]; `normalize_heads` applies it."""

    def __init__(self, config: ModelConfig, *, dim: Literal["heads", "kv_heads"], rules: ShardingRules) -> None:
        self.config, self.dim, self.rules = config, dim, rules
        size = config.query_size if dim == "heads" else config.kv_size
        # As in shifted_norm.py.
        self.offset = 1.0 if config.norm == "rmsnorm1p" else 0.0
        self.scale = nnx.Param(jnp.full(size, 1 - self.offset, jnp.float32), **param_metadata((dim,), rules))

    def scale_of_heads(self) -> jax.Array:
        """Return the scale of the heads as queries meet them, [N@tensor, H].

        With fewer key/value heads than devices each device has the head that it uses, as in `Attention`.
        """
        axes, size = self.rules.axes("heads"), self.config.head_size
        scale_F = self.scale[...] + self.offset if self.offset else self.scale[...]
        if not self.rules.axes(self.dim) and num_blocks(axes) > 1:
            own = lambda whole_F: own_columns(whole_F, axes, unit=size)  # noqa: E731
            scale_F = run_in_blocks(own, rules=self.rules, in_dims=((self.dim,),), out_dims=("heads",))(scale_F)
        return scale_F.reshape(-1, size)


QKNorm = Norm | WholeNorm


def make_qk_norm(
    config: ModelConfig,
    *,
    dim: Literal["heads", "kv_heads"],
    rngs: nnx.Rngs,
    rules: ShardingRules = DEFAULT_RULES,
) -> QKNorm | None:
    """Return the norm of queries or of keys, None (as flax's data) in a model without."""
    if config.qk_norm == "on":
        return make_head_norm(config, rngs=rngs, rules=rules)
    return WholeNorm(config, dim=dim, rules=rules) if config.qk_norm == "whole" else nnx.data(None)


def normalize_heads(
    query_norm: QKNorm, key_norm: QKNorm, q_BTNH: jax.Array, k_BTKH: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return normalized queries and keys: q[B@data, T, N@tensor, H], k[B@data, T, K@tensor, H] of the same shapes."""
    if not isinstance(query_norm, WholeNorm) or not isinstance(key_norm, WholeNorm):
        assert not isinstance(query_norm, WholeNorm)
        assert not isinstance(key_norm, WholeNorm)
        return normalize(query_norm, q_BTNH), normalize(key_norm, k_BTKH)
    axes = query_norm.rules.axes("heads")
    # A head that several devices have counts as often in the sum as in the number of blocks: the mean is the same.
    means = sum_blocks((_mean_square(q_BTNH), _mean_square(k_BTKH)), axes)
    parts = num_manual_blocks(axes)
    q_BTNH = _scale(query_norm, q_BTNH, means[0] / parts)
    return q_BTNH, _scale(key_norm, k_BTKH, means[1] / parts)


# Else its gradient's factor 2 x would be kept beside x.
@partial(jax.checkpoint, prevent_cse=False)
def _mean_square(x_BTNH: jax.Array) -> jax.Array:
    return jnp.square(x_BTNH.astype(jnp.float32)).mean((-2, -1), keepdims=True)


def _scale(norm: WholeNorm, x_BTNH: jax.Array, mean_BT11: jax.Array) -> jax.Array:
    def apply(scale_NH: jax.Array, x_BTNH: jax.Array, mean_BT11: jax.Array) -> jax.Array:
        y_BTNH = x_BTNH.astype(jnp.float32) * jax.lax.rsqrt(mean_BT11 + norm.config.norm_epsilon)
        return (y_BTNH * scale_NH[None, None]).astype(x_BTNH.dtype)

    # As in norms.py: only x is kept for the backward.
    return jax.checkpoint(apply, prevent_cse=False)(norm.scale_of_heads(), x_BTNH, mean_BT11)
