"""A block and a feed-forward of a user's, which a TOML names as acme.blocks:Block."""

from typing import Any, assert_type

import jax
import jax.numpy as jnp
from flax import nnx
from trellax.layers import ColumnLinear, ModelConfig, RowLinear
from trellax.meshes import ShardingRules
from trellax.pipeline import LayerInfo, Output


class Gate(nnx.Module):
    """A feed-forward whose hidden features are split over tensor."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        own: dict[str, Any] = {"dim": "inner", "rngs": rngs, "rules": rules, "dtype": config.dtype}
        self.up = ColumnLinear(config.hidden_size, config.ffn_size, **own)
        self.down = RowLinear(config.ffn_size, config.hidden_size, **own)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up_BTF = self.up(x_BTD)
        assert_type(up_BTF, jax.Array)
        return self.down(jax.nn.relu(up_BTF))


class Block(nnx.Module):
    """A residual block that adds a part to the loss."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        self.gate = Gate(config, rngs=rngs, rules=rules)

    def __call__(self, x_BTD: jax.Array, *, microbatch: dict[str, jax.Array], info: LayerInfo) -> Output:
        assert_type(info.index, jax.Array)
        weights_BT = microbatch["weights"]
        y_BTD = self.gate(x_BTD)
        if info.key is not None:
            assert_type(info.keys(), jax.Array)
        loss = 1e-3 * (weights_BT * jnp.square(y_BTD).mean(-1)).sum()
        return Output(x=x_BTD + y_BTD, loss=loss, metrics={"size": jnp.abs(y_BTD).max()})
