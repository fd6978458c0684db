"""Classes as a user writes them, for `model.block`, `mlp_class`, `norm_class` and `attention_class`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from trellax.layers import Attention, ColumnLinear, ModelConfig, RowLinear
from trellax.layers.collectives import enter_split, sum_blocks
from trellax.layers.dropout import dropout
from trellax.layers.norms import make_norm, normalize
from trellax.layers.partitioning import make_param
from trellax.meshes import ShardingRules
from trellax.pipeline import LayerInfo, Output

INNER = 96


class ParallelBlock(nnx.Module):
    """Attention and feed-forward side by side (Wang and Komatsuzaki 2021), of our layers, with a dim of its own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        shared: dict[str, Any] = {"dim": "inner", "dtype": config.dtype, "rngs": rngs, "rules": rules}
        self.norm = make_norm(config, rngs=rngs, rules=rules)
        self.attention = Attention(config, rngs=rngs, rules=rules)
        self.up = ColumnLinear(config.hidden_size, INNER, **shared)
        self.down = RowLinear(INNER, config.hidden_size, **shared)

    def __call__(self, x_BTD: jax.Array, *, places: Any = None) -> jax.Array:
        n_BTD = normalize(self.norm, x_BTD)
        return x_BTD + self.attention(n_BTD, places) + self.down(jnp.tanh(self.up(n_BTD)))


class ByHand(nnx.Module):
    """A feed-forward of plain parameters, with the sums over tensor written out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        self.axes = rules.axes("inner")
        up, down, d = ("embed", "inner"), ("inner", "embed"), config.hidden_size
        self.up = nnx.Param(0.1 * jax.random.normal(rngs.params(), (d, INNER)), out_sharding=up)
        self.down = make_param(rngs.params(), (INNER, d), down, std=0.1, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x_BTD, up_DF = enter_split(x_BTD, self.up[...], self.axes)
        return sum_blocks(jnp.tanh(x_BTD @ up_DF) @ self.down[...], self.axes)


class FreeNorm(nnx.Module):
    """x / |x|, without parameters."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        del config, rngs, rules

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        return (x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)).astype(x_BTD.dtype)


class ScaleNorm(nnx.Module):
    """x / |x| times one learned number for each feature (Nguyen and Salazar 2019, with a vector)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        del rngs, rules
        self.scale = nnx.Param(jnp.ones(config.hidden_size), out_sharding=("embed",))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        length = jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)
        return (x / length * jnp.expand_dims(self.scale[...], (0, 1))).astype(x_BTD.dtype)


class NoiseBlock(nnx.Module):
    """A dense layer with dropout, a part of the loss and a metric: all that a block may ask for and return."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        self.dense = ParallelBlock(config, rngs=rngs, rules=rules)

    def __call__(self, x_BTD: jax.Array, *, microbatch: Any, info: LayerInfo) -> Output:
        y_BTD = self.dense(x_BTD) - x_BTD
        if info.key is not None:
            y_BTD = dropout(y_BTD, rate=0.2, keys=info.keys())
        square = (y_BTD.astype(jnp.float32) ** 2).mean(-1)
        weighted = (square * microbatch["weights"]).sum()
        return Output(x=x_BTD + y_BTD, loss=0.1 * weighted, metrics={"square": weighted})


class WindowAttention(Attention):
    """Attention to the four last tokens; it inherits what a server needs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> None:
        from dataclasses import replace

        super().__init__(replace(config, attention_window=4, attention_class=""), rngs=rngs, rules=rules)
