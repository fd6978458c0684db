"""The feed-forward half of a block: a column-parallel layer up, a row-parallel layer down, one all-reduce."""

import jax
from flax import nnx

from ..meshes import DEFAULT_RULES, ShardingRules
from .config import ModelConfig
from .linear import INIT_STD, ColumnLinear, RowLinear


class MLP(nnx.Module):
    """GELU (`down(gelu(up(x)))`) or SwiGLU (`down(silu(gate(x)) * up(x))`, Shazeer 2020) over hidden features.

    x[B@data, T, D] -> y[B@data, T, D], with F@tensor in between; one all-reduce forward, one backward.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        into = {"dim": "ffn", "bias": config.bias, "dtype": config.dtype, "rngs": rngs, "rules": rules}
        d, f = config.hidden_size, config.ffn_size
        self.up = ColumnLinear(d, f, **into)
        self.gate = ColumnLinear(d, f, **into) if config.mlp == "swiglu" else nnx.data(None)
        # Residual branches add up: without the 1/sqrt(2L) the stream's variance grows with depth (GPT-2, section 2.3).
        self.down = RowLinear(f, d, std=INIT_STD / (2 * config.num_layers) ** 0.5, **into)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        up_BTF = self.up(x_BTD)
        hidden_BTF = jax.nn.gelu(up_BTF) if self.gate is None else jax.nn.silu(self.gate(x_BTD)) * up_BTF
        return self.down(hidden_BTF)
