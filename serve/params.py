"""Parameters for inference: what a reader fills, in the order of the model, and how the devices then hold it.

A reader (of a run folder, of Hugging Face files) is given `param_shapes` and returns arrays of these, each device
having read its part. `stage_params` turns them into stages, once. Everything is held in the compute dtype, so that no
step casts a weight. Read `stage.py` next.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..layers import ModelConfig, Transformer, model_rules, param_counts, param_dims
from ..meshes import ShardingRules
from ..meshes.rules import split_first_free_dim
from ..pipeline import balance_layers, stages_from_layers

Layers = Literal["loop", "unrolled"]
"""Whether a rank's layers are one loop over one array, or each has arrays and code of its own.

A GPU's matrix products cannot read a slice of an array whose place is known only when they run: in a loop XLA copies
every layer's weights first, which makes decoding three times as long. A loop compiles in the time of one layer.
"""

_KV = ("key", "value")


def param_shapes(config: ModelConfig, *, mesh: Mesh, dtype: str | None = None) -> Any:
    """Return shapes and shardings of a `Transformer`'s parameters as a reader must deliver them.

    A tree {"embed", "blocks", "head"} in natural order, blocks [L@pipe, ...]. Where pipe does not divide the layers,
    another dimension is split over it, if one can be.

    Args:
        dtype: of all parameters; the compute dtype of the config if left out.

    Raises:
        ModelError: heads, feed-forward features or vocabulary do not split over the mesh.
        ScheduleError: there are fewer layers than pipe stages.
    """
    rules = model_rules(config, mesh.shape)
    layers_of_stages(config, num_ranks=mesh.shape["pipe"])
    model = _abstract_model(config, rules)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def place(path: Any, dims: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        own = rules.sharding(dims, shape=leaf.shape, mesh=mesh, name=name)
        if dims[0] == "layer":
            own = _split_over_pipe(own, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, dtype or config.dtype, sharding=own)

    return jax.tree_util.tree_map_with_path(place, param_dims(model), shapes, is_leaf=_is_dims)


def stage_shapes(config: ModelConfig, *, mesh: Mesh, dtype: str | None = None, layers: Layers = "loop") -> Any:
    """Return shapes and shardings of the parameters as the devices hold them: blocks, a tuple of [P@pipe, layers, ...].

    Embedding and head are whole over pipe: only the first and the last stage use theirs.
    """
    rules = model_rules(config, mesh.shape).replace(kv_heads="tensor")
    natural = param_shapes(config, mesh=mesh, dtype=dtype)
    dims = param_dims(_abstract_model(config, rules))["blocks"]

    def place(own: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = rules.sharding(("stage", *own), shape=leaf.shape, mesh=mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    stacks = jax.eval_shape(partial(_to_stacks, config, mesh, layers), natural["blocks"])
    return natural | {"blocks": tuple(jax.tree.map(place, dims, stack, is_leaf=_is_dims) for stack in stacks)}


def stage_params(params: Any, *, config: ModelConfig, mesh: Mesh, layers: Layers = "loop") -> Any:
    """Return the parameters a reader delivered as stages; blocks are given up, so that no device holds both.

    Unequal stages are padded with zeros; key/value heads that are fewer than `tensor` devices are repeated.
    """
    dtype = jax.tree.leaves(params)[0].dtype
    shapes = stage_shapes(config, mesh=mesh, dtype=dtype, layers=layers)["blocks"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    if layers == "loop" and not _changes_shape(config, mesh):
        cut = jax.jit(partial(_to_stacks, config, mesh, layers), out_shardings=shardings, donate_argnums=0)
        return params | {"blocks": cut(params["blocks"])}
    # Other shapes cannot take the place of what they are made of: parameter by parameter, little is there twice.
    paths, tree = jax.tree_util.tree_flatten_with_path(params["blocks"])
    columns = []
    for (path, leaf), *own in zip(paths, *map(jax.tree.leaves, shardings), strict=True):
        cut = jax.jit(partial(_cut, config, mesh, layers, path), out_shardings=tuple(own))
        columns.append(cut(leaf))
        leaf.delete()
    return params | {"blocks": tuple(jax.tree.unflatten(tree, stack) for stack in zip(*columns, strict=True))}


def stack_sizes(config: ModelConfig, *, num_ranks: int, layers: Layers) -> tuple[int, ...]:
    """Return how many layers of a stage each array of parameters holds: all of them, or one."""
    room = max(layers_of_stages(config, num_ranks=num_ranks))
    return (room,) if layers == "loop" else (1,) * room


def served_config(config: ModelConfig, mesh: Mesh) -> ModelConfig:
    """Return the model as the devices see it: at least one key/value head for each of a tensor group."""
    return replace(config, num_kv_heads=max(config.num_kv_heads, mesh.shape["tensor"]))


def layers_of_stages(config: ModelConfig, *, num_ranks: int) -> tuple[int, ...]:
    """Return how many layers each stage has, so that the bytes a token reads are spread evenly.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    # Decoding waits for memory: the head weighs as many layers as its table has bytes of a layer's weights.
    head = config.vocab_size * config.hidden_size / param_counts(config).block
    return balance_layers(config.num_layers, num_stages=num_ranks, last_extra=head if num_ranks > 1 else 0.0)


def _to_stacks(config: ModelConfig, mesh: Mesh, layers: Layers, blocks: Any) -> tuple[Any, ...]:
    cut = jax.tree_util.tree_map_with_path(partial(_cut, config, mesh, layers), blocks)
    is_cut = lambda node: isinstance(node, tuple)  # noqa: E731
    count = len(jax.tree.leaves(cut, is_leaf=is_cut)[0])
    return tuple(jax.tree.map(lambda leaf: leaf[index], cut, is_leaf=is_cut) for index in range(count))  # noqa: B023


def _cut(config: ModelConfig, mesh: Mesh, layers: Layers, path: Any, leaf: jax.Array) -> tuple[jax.Array, ...]:
    """One parameter of all layers [L, ...] as arrays [P, layers, ...]."""
    num_ranks = mesh.shape["pipe"]
    copies = served_config(config, mesh).num_kv_heads // config.num_kv_heads
    if copies > 1 and any(getattr(key, "key", None) in _KV for key in path):
        heads = leaf.reshape(*leaf.shape[:-1], config.num_kv_heads, config.head_size)
        leaf = jnp.repeat(heads, copies, axis=-2).reshape(*leaf.shape[:-1], -1)
    counts = layers_of_stages(config, num_ranks=num_ranks)
    stages = stages_from_layers(leaf, num_ranks=num_ranks, layers_per_stage=counts)[0]
    sizes = stack_sizes(config, num_ranks=num_ranks, layers=layers)
    return tuple(stages[:, index * size : (index + 1) * size] for index, size in enumerate(sizes))


def _changes_shape(config: ModelConfig, mesh: Mesh) -> bool:
    counts = layers_of_stages(config, num_ranks=mesh.shape["pipe"])
    return len(set(counts)) > 1 or served_config(config, mesh) != config


def _split_over_pipe(own: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a stack of layers with one of its dimensions over pipe too: the layers, if they divide."""
    spec = split_first_free_dim(own.spec, shape=shape, axis="pipe", size=own.mesh.shape["pipe"])
    return NamedSharding(own.mesh, spec)


def _abstract_model(config: ModelConfig, rules: ShardingRules) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple)
