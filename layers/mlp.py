"""The feed-forward half of a block: a column-parallel layer up, a row-parallel layer down, one all-reduce."""

from functools import partial
from typing import Any

import jax
from flax import nnx

from ..meshes import DEFAULT_RULES, ShardingRules
from .collectives import enter, num_auto_blocks, num_blocks
from .config import ModelConfig
from .joined_linear import JoinedLinear
from .linear import ColumnLinear, RowLinear
from .partitioning import INIT_STD


class MLP(nnx.Module):
    """GELU (`down(gelu(up(x)))`) or SwiGLU (`down(silu(gate(x)) * up(x))`, Shazeer 2020) over hidden features.

    x[B@data, T, D] -> y[B@data, T, D], with F@tensor in between; one all-reduce forward, one backward.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.rules = rules
        shared: dict[str, Any] = {
            "dim": "ffn",
            "bias": config.other_bias,
            "dtype": config.dtype,
            "matmuls": config.matmuls,
            "rngs": rngs,
            "rules": rules,
        }
        d, f = config.hidden_size, config.ffn_size
        self.up = ColumnLinear(d, f, **shared)
        self.gate = ColumnLinear(d, f, **shared) if config.mlp == "swiglu" else nnx.data(None)
        self.gate_up: JoinedLinear | None = nnx.data(None)
        # Residual branches add up: without the 1/sqrt(2L) the stream's variance grows with depth (GPT-2, section 2.3).
        self.down = RowLinear(f, d, std=INIT_STD / (2 * config.num_layers) ** 0.5, **shared)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        if self.gate_up is not None:
            return self.down(_swish_gate(*self.gate_up(x_BTD)))
        if self.gate is None:
            return self.down(_gelu(self.up(x_BTD)))
        return self.down(_swish_gate(*self._expand(self.gate, x_BTD)))

    def join(self) -> None:
        """Replace gate and up by one joined layer, where feed-forward features are split.

        Without this every call joins them again, which in a loop copies their kernels in every iteration.
        """
        if self.gate is not None and num_blocks(self.rules.axes("ffn")) > 1:
            self.gate_up = self._join(self.gate)
            del self.gate, self.up

    def _expand(self, gate: ColumnLinear, x_BTD: jax.Array) -> list[jax.Array]:
        """Compute gate and up; as one product where they are split, so that the backward all-reduces dx once."""
        axes = self.rules.axes("ffn")
        if num_auto_blocks(axes) == 1:
            x_BTD = enter(x_BTD, axes)
            return [gate(x_BTD), self.up(x_BTD)]
        return self._join(gate)(x_BTD)

    def _join(self, gate: ColumnLinear) -> JoinedLinear:
        return JoinedLinear((gate, self.up))


# Plain autodiff keeps every intermediate of these formulas, six arrays of feed-forward width for GELU. Only their
# inputs are kept here; the backward recomputes the rest, which is elementwise work and no matmul.
@partial(jax.checkpoint, prevent_cse=False)
def _gelu(up_BTF: jax.Array) -> jax.Array:
    return jax.nn.gelu(up_BTF)


@partial(jax.checkpoint, prevent_cse=False)
def _swish_gate(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BTF) * up_BTF
