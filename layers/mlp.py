"""The feed-forward half of a block: a column-parallel layer up, a row-parallel layer down, one all-reduce."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_count
from .config import ModelConfig
from .joined_linear import JoinedLinear, join_split
from .linear import ColumnLinear, RowLinear
from .lora.check_config import lora_of
from .options.check_config import CLAMP, SHARPNESS
from .partitioning import INIT_STD


class MLP(nnx.Module):
    """GELU (`down(gelu(up(x)))`), SwiGLU (`down(silu(gate(x)) * up(x))`, Shazeer 2020) or others of `gate_of`.

    x[B@data, T, D] -> y[B@data, T, D], with F@tensor in between; one all-reduce forward, one backward.

    Args:
        features: hidden features, those of the config if left out.
        name: its dotted name within a layer, by which its linear layers have adapters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        rules: ShardingRules = DEFAULT_RULES,
        features: int = 0,
        name: str = "mlp",
    ) -> None:
        check_count("features", features, error=ModelError, least=0)
        self.rules, self.act = rules, gate_of(config)
        shared: dict[str, Any] = {
            "dim": "ffn",
            "bias": config.other_bias,
            "dtype": config.dtype,
            "matmuls": config.matmuls,
            "rngs": rngs,
            "rules": rules,
        }
        d, f = config.hidden_size, features or config.ffn_size
        up, gate, down = (lora_of(config, f"{name}.{own}") for own in ("up", "gate", "down"))
        self.up = ColumnLinear(d, f, lora=up, **shared)
        self.gate = ColumnLinear(d, f, lora=gate, **shared) if config.is_gated else nnx.data(None)
        self.gate_up: JoinedLinear | None = nnx.data(None)
        # Residual branches add up: without the 1/sqrt(2L) the stream's variance grows with depth (GPT-2, section 2.3).
        std = INIT_STD / (2 * config.num_layers) ** 0.5
        self.down = RowLinear(f, d, std=std, lora=down, **shared)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        joined = self.gate_up or self._join()
        if joined is not None:
            return self.down(self.act(*joined(x_BTD)))
        up_BTF = self.up(x_BTD)
        return self.down(gelu(up_BTF) if self.gate is None else self.act(self.gate(x_BTD), up_BTF))

    def join(self) -> None:
        """Replace gate and up by one joined layer, where feed-forward features are split.

        Without this every call joins them again, which in a loop copies their kernels in every iteration.
        """
        self.gate_up = self._join()
        if self.gate_up is not None:
            del self.gate, self.up

    def _join(self) -> JoinedLinear | None:
        return None if self.gate is None else join_split((self.gate, self.up))


# Plain autodiff keeps every intermediate of these formulas, six arrays of feed-forward width for GELU. Only their
# inputs are kept here; the backward recomputes the rest, which is elementwise work and no matmul.
@partial(jax.checkpoint, prevent_cse=False)
def gelu(up_BTF: jax.Array) -> jax.Array:
    """Return the GELU of each feature."""
    return jax.nn.gelu(up_BTF)


@partial(jax.checkpoint, prevent_cse=False)
def swish_gate(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """Return silu(gate) * up."""
    return jax.nn.silu(gate_BTF) * up_BTF


@partial(jax.checkpoint, prevent_cse=False)
def gelu_gate(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """Return gelu(gate) * up, GELU in its approximation by tanh."""
    return jax.nn.gelu(gate_BTF) * up_BTF


@partial(jax.checkpoint, prevent_cse=False)
def clamped_gate(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """Return gate sigmoid(1.702 gate) (up + 1), gate at most 7 and up within 7 of 0 (OpenAI 2025, gpt-oss)."""
    gate_BTF, up_BTF = jnp.minimum(gate_BTF, CLAMP), jnp.clip(up_BTF, -CLAMP, CLAMP)
    return gate_BTF * jax.nn.sigmoid(SHARPNESS * gate_BTF) * (up_BTF + 1)


Gate = Callable[[jax.Array, jax.Array], jax.Array]

_GATES: dict[str, Gate] = {"swiglu": swish_gate, "geglu": gelu_gate, "clamped_swiglu": clamped_gate}


def gate_of(config: ModelConfig) -> Gate:
    """Return the function of gate and up of a model; SwiGLU's where there is no gate."""
    return _GATES.get(config.mlp, swish_gate)
