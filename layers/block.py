"""One pre-norm block, and a stack of them as one scan: program size does not grow with depth."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from flax import nnx

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice
from .attention import Attention
from .blockwise import FLASH_OUTPUTS
from .cache import KVCache, NewTokens
from .config import ModelConfig
from .mlp import MLP
from .norms import apply_norm, make_norm, normalize

Remat = Literal["none", "full", "dots"]
"""What backward recomputes: nothing; each block from its input; or all but the outputs of weight matmuls and of flash
attention."""


class Block(nnx.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)).

    x[B@data, T, D] -> y[B@data, T, D]; two all-reduces over `tensor` forward and two backward.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.attention_norm = make_norm(config, rngs=rngs, rules=rules)
        self.attention = Attention(config, rngs=rngs, rules=rules)
        self.mlp_norm = make_norm(config, rngs=rngs, rules=rules)
        self.mlp = MLP(config, rngs=rngs, rules=rules)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        x_BTD = x_BTD + self.attention(normalize(self.attention_norm, x_BTD))
        return x_BTD + self.mlp(normalize(self.mlp_norm, x_BTD))

    def join(self) -> None:
        """Make products of one input one, where they are split: in this module, in place of the layers that they join.

        What a step does once with the parameters of all its layers, so that its loops need not.
        """
        self.attention.join()
        self.mlp.join()

    def extend(
        self, x_BTD: jax.Array, *, cache: KVCache, layer: jax.Array | int, new: NewTokens
    ) -> tuple[jax.Array, KVCache]:
        """Return new tokens after this block, and the cache with them: x[B@data, T, D] -> y[B@data, T, D]."""
        attended_BTD, cache = self.attention.extend(
            apply_norm(self.attention_norm, x_BTD), cache=cache, layer=layer, new=new
        )
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.mlp(apply_norm(self.mlp_norm, x_BTD)), cache


def stack_blocks(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Block:
    """Return one `Block` whose parameters have a leading dimension of layers: [L, ...], each layer drawn on its own."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
    def make(layer_rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=layer_rngs, rules=rules)

    return make(rngs)


def run_blocks(graph: Any, params_L: Any, x_BTD: jax.Array, *, remat: Remat = "dots") -> jax.Array:
    """Return x after every layer of a stack, in order.

    params[L, ...], x[B@data, T, D] -> y[B@data, T, D]

    Args:
        graph: `nnx.split(block)[0]` of a stacked block.
        params_L: its state as pure arrays, [layers, ...].
        remat: what backward recomputes.
    """

    def layer(x_BTD: jax.Array, params: Any) -> tuple[jax.Array, None]:
        return nnx.merge(graph, params)(x_BTD), None

    return jax.lax.scan(rematerialize(layer, remat), x_BTD, params_L)[0]


def rematerialize(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Return the layer with its backward recomputing what the policy says.

    none: what is cheap for its size, inside norms and activation functions. dots: whatever lies between products and
    attention, whose outputs are kept; on CPUs the faster one, since less is written and read; no GPU has timed it.
    full: all but the layer's input.

    Raises:
        ModelError: there is no such policy.
    """
    check_choice("remat", remat, get_args(Remat), error=ModelError)
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    keep_flash = policies.save_only_these_names(FLASH_OUTPUTS)
    keep_dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, keep_flash)
    policy = None if remat == "full" else keep_dots
    # prevent_cse guards against merging recomputation with the forward; a scan already keeps them apart.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
