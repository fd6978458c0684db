"""RMSNorm whose scale is stored minus one, as in Gemma's files: y = x / rms(x) x (1 + scale)."""

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import DEFAULT_RULES, ShardingRules
from ..config import ModelConfig
from ..partitioning import param_metadata


class ShiftedNorm(nnx.Module):
    """RMSNorm over the last dimension: x[B@data, T, ..., H] -> y of the same shape, computed in float32.

    The scale starts at 0, so that decay of weights pulls it to no change. Adding 1 to it when files are read would
    round it: what is stored is read and written to the last bit.
    """

    def __init__(
        self, config: ModelConfig, *, size: int, dim: str = "embed", rules: ShardingRules = DEFAULT_RULES
    ) -> None:
        self.epsilon, self.dtype = config.norm_epsilon, config.dtype
        self.scale = nnx.Param(jnp.zeros(size, jnp.float32), **param_metadata((dim,), rules))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalized x in the compute dtype."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = jnp.expand_dims(1 + self.scale[...].astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (normed * scale).astype(self.dtype)
