"""Run one rank's part of the model on new tokens: embedding, its layers with the cache, and head with sampling.

For use inside `shard_map` over all mesh axes. All collectives are explicit, here or in the layers: two all-reduces per
layer over `tensor`, and where experts are split what `layers/experts/summed.py` says. Read `decode.py` next.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ..layers import Embedding, Head, KVCache, ModelConfig, NewTokens, Transformer
from ..layers.collectives import max_blocks
from ..layers.experts.kinds import layer_kinds
from ..layers.quantized import Weights
from ..meshes import MeshAxes, ShardingRules
from ..meshes.axes import DEFAULT_AXES
from ..meshes.device_axes import manual_axes, mark_varying
from ..meshes.ring import check_ring
from ..pipeline.executor.buffers import read
from ..pipeline.model.trees import on_mesh
from .params import block_on
from .sampling.choose import Choice, choose
from .sampling.settings import SamplingSettings
from .stacks import LayerLoop, StageStack, stage_stacks


class Stage:
    """The model as the ranks of a mesh run it; it holds no arrays.

    Parameters are this device's blocks of those of `stage_shapes`: a tuple of [1, layers, ...].
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        layers: LayerLoop = "loop",
        axes: MeshAxes = DEFAULT_AXES,
        weights: Weights = "plain",
    ) -> None:
        self.config, self.num_ranks, self.rules = config, mesh.shape[axes.pipe], ShardingRules.of(axes)
        self.stacks = stage_stacks(config, num_ranks=self.num_ranks, layers=layers)
        self._blocks = {
            kind.name: block_on(mesh, kind, model=config, axes=axes, weights=weights) for kind in layer_kinds(config)
        }
        model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=self.rules))
        self._graphs: dict[str, Any] = {name: nnx.split(getattr(model, name))[0] for name in ("embed", "head")}

    @property
    def pipe(self) -> str:
        """The mesh axis of the ranks."""
        return self.rules.mesh_axes.pipe

    def vary(self, x: jax.Array) -> jax.Array:
        """Return x marked as varying over the ranks and data shards."""
        return mark_varying(x, manual_axes((self.pipe, *self.rules.mesh_axes.batch)))

    @property
    def rank(self) -> jax.Array | int:
        """The position of this device along `pipe`."""
        return jax.lax.axis_index(self.pipe) if self.num_ranks > 1 else 0

    def any_together(self, has_work: jax.Array) -> jax.Array:
        """Return whether this device has work, or one with which it shares experts, which take part in each layer.

        It costs an all-reduce of one number over the axes that split experts, if there are any.
        """
        axes = manual_axes(self.rules.axes("experts")) if self.config.num_experts else ()
        return self.vary(max_blocks(has_work.astype(jnp.int32), axes) > 0) if axes else has_work

    def on_rank(self, rank: int, work: Any, otherwise: Any) -> Any:
        """Return `work()` on one rank and `otherwise()` on the others; no rank runs both."""
        if self.num_ranks == 1:
            return work()
        return jax.lax.cond(self.rank == rank, work, otherwise)

    @jax.named_scope("embed")
    def embed(self, params: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Embed tokens[b, T] at positions [b, T] -> x[b, T, D]; costs one all-reduce of x over `tensor`."""
        embed: Embedding = nnx.merge(self._graphs["embed"], params["embed"])
        return self.vary(embed(tokens_BT, positions_BT=positions_BT))

    @jax.named_scope("layers")
    def run_layers(self, params: Any, x_BTD: jax.Array, *, cache: KVCache, new: NewTokens) -> tuple[jax.Array, KVCache]:
        """Run this rank's layers: x[b, T, D] -> x[b, T, D], and the cache with the new tokens.

        It costs two all-reduces of x per layer over `tensor`.
        """
        keys, values = [], []
        for stack, own_params, *stored in zip(self.stacks, params["blocks"], cache.keys, cache.values, strict=True):
            own = KVCache(keys=stored[0], values=stored[1], lengths=cache.lengths)
            x_BTD, own = self._run_stack(stack, own_params, x_BTD, own, new)
            keys.append(own.keys)
            values.append(own.values)
        end_B = new.starts + new.counts
        # Rows without a new token keep their length: a group may have slots that are not in use.
        kept_B = jax.lax.dynamic_slice(cache.lengths, (0, new.row), (1, end_B.shape[0]))[0]
        length_B = jnp.where(new.counts > 0, end_B, kept_B)
        lengths = jax.lax.dynamic_update_slice(cache.lengths, length_B[None], (0, new.row))
        return x_BTD, KVCache(keys=tuple(keys), values=tuple(values), lengths=lengths)

    def _run_stack(
        self, stack: StageStack, params: Any, x_BTD: jax.Array, cache: KVCache, new: NewTokens
    ) -> tuple[jax.Array, KVCache]:
        """Run the layers of one array of parameters, without the padding of a shorter stage."""

        def layer(index: jax.Array | int, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            x_BTD, cache = carry
            block = self._blocks[stack.kind.name].merge(read(params, 0, index))
            own = {"number": stack.number_of(index, self.rank)} if self.config.attention_pattern else {}
            x_BTD, cache = block.extend(x_BTD, cache=cache, layer=index, new=new, **own)
            return self.vary(x_BTD), cache

        size = stack.size
        # Layers that every stage has: the length of the loop is a constant. A single one needs no loop (`LayerLoop`).
        if stack.is_full:
            return layer(0, (x_BTD, cache)) if size == 1 else jax.lax.fori_loop(0, size, layer, (x_BTD, cache))
        # Stages with fewer layers end the loop before their padding.
        own = jnp.clip(jnp.asarray(stack.counts)[self.rank] - stack.first, 0, size)
        return jax.lax.fori_loop(0, own, layer, (x_BTD, cache))

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The mesh axes over which the vocabulary is split."""
        return self.rules.axes("vocab")

    @jax.named_scope("choose")
    def choose(
        self,
        params: Any,
        x_B1D: jax.Array,
        settings: SamplingSettings,
        *,
        read_seen: Callable[[], jax.Array],
        read_allowed: Callable[[], jax.Array],
        position_B: jax.Array,
    ) -> Choice:
        """Choose the next tokens: x[b, 1, D] of the last tokens -> tokens[b] for positions `position_B`.

        Args:
            read_seen, read_allowed: as of `sampling.choose`.
        """
        head: Head = nnx.merge(self._graphs["head"], params["head"])
        logits_B1V = head(x_B1D, embedding_VD=params["embed"]["table"])
        own: dict[str, Any] = {"axes": self.vocab_axes, "vocab_size": self.config.vocab_size}
        reads: dict[str, Any] = {"read_seen": read_seen, "read_allowed": read_allowed}
        choice = choose(logits_B1V[:, 0], settings, **reads, position_B=position_B, **own)
        return jax.tree.map(self.vary, choice)

    def pass_on(self, x: jax.Array, *, shape: Literal["line", "ring"]) -> jax.Array:
        """Return x of the previous rank; costs one permute over `pipe`.

        Args:
            shape: "ring" links the last rank to the first, "line" does not, and the first rank receives zeros.
        """
        if self.num_ranks == 1:
            return x
        if shape == "ring":
            check_ring(jax.sharding.get_abstract_mesh(), what="decoding", pipe=self.pipe)
        links = [(rank, (rank + 1) % self.num_ranks) for rank in range(self.num_ranks)]
        return jax.lax.ppermute(x, self.pipe, links if shape == "ring" else links[:-1])


def block_specs(shapes: Any, mesh: Mesh) -> Any:
    """Return the specs of sharded shapes for a `shard_map`, without axes of one device, along which nothing varies."""
    return on_mesh(jax.tree.map(lambda leaf: leaf.sharding.spec, shapes), mesh)


rows_of = partial(jax.lax.dynamic_slice_in_dim, axis=0)
"""Return rows of an array: `rows_of(x, start, size)`, with a start that is known only at run time."""
