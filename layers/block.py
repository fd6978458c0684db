"""One residual block, and a stack of them as one scan: program size does not grow with depth."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from ..meshes import DEFAULT_RULES, ModelError, ShardingRules
from ..meshes.arguments import check_choice
from .attention.attention import Attention
from .attention.blockwise import FLASH_OUTPUTS
from .attention.cache import KVCache, NewTokens
from .collectives import BLOCK_SUMS
from .config import ModelConfig
from .context.gathered import GATHERED_KEYS
from .context.places import Places
from .dropout import BranchNoise
from .experts.kinds import LayerKind, layer_kinds
from .experts.moe import ExpertStats, MoE
from .experts.rounds import EXPERT_ROWS
from .latent.attention import LatentAttention
from .lora.adapter import ADAPTED
from .mlp import MLP
from .norms import apply_norm, make_norm, normalize
from .own.call import join_layers, run_alone, same_as
from .own.load import asked_of
from .own.make import make_own
from .own.mistakes import code_of

Remat = Literal["none", "full", "dots"]
"""Rematerialization policy: recompute nothing in the backward, each block from its input ("full"), or everything but
the outputs of weight matmuls and of flash attention ("dots")."""


class Block(nnx.Module):
    """Residual block: x + attention(norm(x)), then x + mlp(norm(x)); by `norm_place` norm(attention(x)), or both norms.

    x[B@data, T, D] -> y[B@data, T, D]; two all-reduces over `tensor` forward and two backward. With `dense_layers` a
    block is one of those with experts; `layer_kinds` has the configs of both.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> None:
        self.residual_scale, self.rules = config.residual_scale, rules
        norm = partial(make_norm, config, rngs=rngs, rules=rules)
        is_before, is_after = config.norm_place != "after", config.norm_place != "before"
        self.attention_norm = norm() if is_before else nnx.data(None)
        self.attention = _make_attention(config, rngs=rngs, rules=rules)
        self.mlp_norm = norm() if is_before else nnx.data(None)
        self.mlp = _make_mlp(config, rngs=rngs, rules=rules)
        self.attention_out_norm = norm() if is_after else nnx.data(None)
        self.mlp_out_norm = norm() if is_after else nnx.data(None)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x[B@data, T, D] -> y[B@data, T, D]."""
        return self.run(x_BTD)[0]

    def run(
        self,
        x_BTD: jax.Array,
        weights_BT: jax.Array | None = None,
        places: Places | None = None,
        noise: BranchNoise | None = None,
        layer: jax.Array | int | None = None,
    ) -> tuple[jax.Array, ExpertStats]:
        """Return the output, and what a layer of experts adds to sums of the step; empty for a dense one.

        x[B@data, T, D], weights of the loss [B@data, T], all tokens -> y[B@data, T, D]

        Args:
            layer: number of the layer in the model, if layers differ (`attention_pattern`).
        """
        y_BTD = self._attend(normalize(self.attention_norm, x_BTD), places, layer)
        y_BTD = normalize(self.attention_out_norm, same_as(x_BTD, y_BTD, self.attention))
        x_BTD = self._add(x_BTD, y_BTD if noise is None else noise.drop(y_BTD, branch=0, rules=self.rules))
        y_BTD, stats = self._feed_forward(normalize(self.mlp_norm, x_BTD), weights_BT)
        y_BTD = normalize(self.mlp_out_norm, y_BTD)
        return self._add(x_BTD, y_BTD if noise is None else noise.drop(y_BTD, branch=1, rules=self.rules)), stats

    def _attend(self, x_BTD: jax.Array, places: Places | None, layer: jax.Array | int | None) -> jax.Array:
        if type(self.attention) in (Attention, LatentAttention):
            return self.attention(x_BTD, places, layer)
        # A class of the user's knows no numbers of layers.
        own = {"places": places} if "places" in asked_of(self.attention) else {}
        if places is not None and not own:
            raise ModelError(
                f"{type(self.attention).__name__} is not told where documents begin, and a sequence holds several: its "
                "tokens would attend to those of other documents.",
                fix="write def __call__(self, x_BTD, places=None), and use them; or data.packing='off'.",
            )
        with code_of(self.attention):
            return self.attention(x_BTD, **own)

    def _add(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Add the output of a layer to the residual stream."""
        return x_BTD + (y_BTD if self.residual_scale == 1 else y_BTD * self.residual_scale)

    def _feed_forward(self, x_BTD: jax.Array, weights_BT: jax.Array | None) -> tuple[jax.Array, ExpertStats]:
        if isinstance(self.mlp, MoE):
            return self.mlp(x_BTD, weights_BT)
        with code_of(self.mlp):
            y_BTD = self.mlp(x_BTD)
        return same_as(x_BTD, y_BTD, self.mlp), ExpertStats()

    def join(self) -> None:
        """Replace layers that read the same input by one joined layer each, where they are split.

        A training step does this once to the parameters of all layers, so that its loops do not copy kernels.
        """
        join_layers(self.attention)
        join_layers(self.mlp)

    def extend(
        self,
        x_BTD: jax.Array,
        *,
        cache: KVCache,
        layer: jax.Array | int,
        new: NewTokens,
        number: jax.Array | int | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Return the block's output for new tokens, and the cache with them: x[B@data, T, D] -> y[B@data, T, D].

        Args:
            layer: position of the layer in the cache; number: that in the model, if layers differ.
        """
        own = {} if number is None else {"number": number}
        attended_BTD, cache = self.attention.extend(
            apply_norm(self.attention_norm, x_BTD), cache=cache, layer=layer, new=new, **own
        )
        x_BTD = self._add(x_BTD, apply_norm(self.attention_out_norm, attended_BTD))
        y_BTD = apply_norm(self.mlp_norm, x_BTD)
        y_BTD = self.mlp.extend(y_BTD) if isinstance(self.mlp, MoE) else self._feed_forward(y_BTD, None)[0]
        return self._add(x_BTD, apply_norm(self.mlp_out_norm, y_BTD)), cache


def _make_attention(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> Any:
    if config.attention_class:
        return make_own(config, "attention_class", rngs=rngs, rules=rules)
    return (LatentAttention if config.latent_size else Attention)(config, rngs=rngs, rules=rules)


def _make_mlp(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules) -> Any:
    if config.mlp_class:
        return make_own(config, "mlp_class", rngs=rngs, rules=rules)
    return (MoE if config.num_experts else MLP)(config, rngs=rngs, rules=rules)


def make_block(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """Return a `Block`, or a block of the class that the config names."""
    if config.block:
        return make_own(config, "block", rngs=rngs, rules=rules)
    return Block(config, rngs=rngs, rules=rules)


Stack = Any
"""All blocks of a model, [L, ...] by kind: a `Block`, one of the user's, or an `nnx.Dict` of blocks by kind."""


def stack_blocks(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Stack:
    """Return one `Block` with a leading dimension "layer" on every parameter, [L, ...], or one for each kind of layer.

    Each layer is drawn on its own.
    """

    def stack(kind: LayerKind) -> Block:
        @nnx.split_rngs(splits=kind.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
        def make(layer_rngs: nnx.Rngs) -> Block:
            return make_block(kind.config, rngs=layer_rngs, rules=rules)

        return make(rngs)

    stacks = {kind.name: stack(kind) for kind in layer_kinds(config)}
    return stacks[""] if "" in stacks else nnx.Dict(stacks)


def stacks_of(blocks: Stack) -> tuple[Block, ...]:
    """Return the stacked blocks of each kind, in the order of the model."""
    return tuple(blocks.values()) if isinstance(blocks, nnx.Dict) else (blocks,)


def run_blocks(
    graph: Any,
    params_L: Any,
    x_BTD: jax.Array,
    *,
    weights_BT: jax.Array | None = None,
    places: Places | None = None,
    numbers_L: jax.Array | None = None,
    remat: Remat = "dots",
) -> tuple[jax.Array, jax.Array]:
    """Return x after all layers of one kind, run in order by one scan, and the sum of the losses of routers.

    params[L, ...], x[B@data, T, D] -> y[B@data, T, D], float32 []

    Args:
        graph: `nnx.split(block)[0]` of a stacked block.
        params_L: its state as pure arrays, [layers, ...].
        weights_BT: weights of tokens in the loss; without them routers add none.
        places: where tokens stand, if a sequence holds several documents.
        numbers_L: numbers of the layers in the model, int32 [L], if layers differ.
        remat: rematerialization policy.
    """

    def layer(x_BTD: jax.Array, own: tuple[Any, jax.Array | None]) -> tuple[jax.Array, jax.Array | None]:
        params, number = own
        block = nnx.merge(graph, params)
        if not isinstance(block, Block):
            return run_alone(block, x_BTD, places)
        y_BTD, stats = block.run(x_BTD, weights_BT, places, layer=number)
        return y_BTD, stats.loss

    y_BTD, losses = jax.lax.scan(rematerialize(layer, remat), x_BTD, (params_L, numbers_L))
    return y_BTD, jnp.zeros((), jnp.float32) if losses is None else losses.sum()


def rematerialize(layer: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Return the layer under a rematerialization policy (Chen et al. 2016, section 4).

    - "none" recomputes only the inside of norms and activation functions, which are cheap for their size.
    - "dots" keeps the outputs of weight matmuls and of attention and recomputes all between them. On CPUs it is faster
      than "none", since less is written and read; it has not been timed on a GPU.
    - "full" keeps only the layer's input.

    Raises:
        ModelError: there is no such policy.
    """
    check_choice("remat", remat, get_args(Remat), error=ModelError)
    if remat == "none":
        return layer
    policies = jax.checkpoint_policies
    keep_named = policies.save_only_these_names(FLASH_OUTPUTS, GATHERED_KEYS, BLOCK_SUMS, EXPERT_ROWS, ADAPTED)
    keep_dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, keep_named)
    policy = None if remat == "full" else keep_dots
    # prevent_cse guards against merging recomputation with the forward; a scan already keeps them apart.
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
