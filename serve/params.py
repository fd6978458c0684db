"""Shapes of a model's parameters for inference, in natural order and divided into pipeline stages.

A reader of a run folder or of Hugging Face files gets `param_shapes` and returns arrays of these shapes, of which each
device has read its part. `stage_params` divides them into stages, once. Parameters are in the compute dtype, so that no
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
from ..meshes import MeshAxes, MeshSpec, ShardingRules, mesh_sizes
from ..meshes.axes import DEFAULT_AXES
from ..meshes.rules import split_first_free_dim
from ..pipeline import balance_layers, stages_from_layers

LayerLoop = Literal["loop", "unrolled"]
"""Whether a rank runs its layers in one loop over stacked arrays, or each layer has its own arrays and code.

On a GPU, a matrix product cannot read a slice of an array at an index that is known only at run time: in a loop, XLA
first copies the weights of every layer, and decoding takes three times as long. A loop compiles faster, in the time of
one layer.
"""

_KV = ("key", "value")


def param_shapes(config: ModelConfig, *, mesh: Mesh, dtype: str | None = None, axes: MeshAxes = DEFAULT_AXES) -> Any:
    """Return shapes and shardings of a `Transformer`'s parameters in natural order, for a reader to fill.

    They are a tree {"embed", "blocks", "head"}, blocks [L@pipe, ...]. If pipe does not divide the number of layers, it
    splits the first other dimension that it divides.

    Args:
        dtype: dtype of all parameters; by default the compute dtype of the config.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.

    Raises:
        MeshError: an axis with several devices has no role, or one that no layer uses.
        ModelError: heads, feed-forward features or vocabulary do not split over the mesh.
        ScheduleError: there are fewer layers than pipe stages.
    """
    axes = mesh_sizes(mesh, axes=axes).roles
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes))
    layers_of_stages(config, num_ranks=mesh.shape[axes.pipe])
    model = _abstract_model(config, rules)
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def place(path: Any, dims: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        own = rules.sharding(dims, shape=leaf.shape, mesh=mesh, name=name)
        if dims[0] == "layer":
            own = _split_over_pipe(own, leaf.shape, pipe=axes.pipe)
        return jax.ShapeDtypeStruct(leaf.shape, dtype or config.dtype, sharding=own)

    return jax.tree_util.tree_map_with_path(place, param_dims(model), shapes, is_leaf=_is_dims)


def stage_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    layers: LayerLoop = "loop",
    axes: MeshAxes = DEFAULT_AXES,
) -> Any:
    """Return shapes and shardings of parameters in stages: blocks are a tuple of [P@pipe, layers, ...].

    Embedding and head are replicated over pipe, although only the first and the last stage use them.

    Raises:
        ModelError, ScheduleError: as `param_shapes`.
    """
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes)).replace(kv_heads=axes.tensor)
    natural = param_shapes(config, mesh=mesh, dtype=dtype, axes=axes)
    dims = param_dims(_abstract_model(config, rules))["blocks"]

    def place(own: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = rules.sharding(("stage", *own), shape=leaf.shape, mesh=mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    stacks = jax.eval_shape(partial(_to_stacks, config, mesh_sizes(mesh, axes=axes), layers), natural["blocks"])
    return natural | {"blocks": tuple(jax.tree.map(place, dims, stack, is_leaf=_is_dims) for stack in stacks)}


def stage_params(
    params: Any, *, config: ModelConfig, mesh: Mesh, layers: LayerLoop = "loop", axes: MeshAxes = DEFAULT_AXES
) -> Any:
    """Divide parameters into stages; the blocks are donated, so that no device holds them twice.

    Unequal stages are padded with zeros. If there are fewer key/value heads than `tensor` devices, they are repeated.

    blocks [L@pipe, ...] -> a tuple of [P@pipe, layers, ...], one for each array of `stack_sizes`

    Raises:
        ModelError, ScheduleError: as `param_shapes`.
    """
    dtype, sizes = jax.tree.leaves(params)[0].dtype, mesh_sizes(mesh, axes=axes)
    shapes = stage_shapes(config, mesh=mesh, dtype=dtype, layers=layers, axes=axes)["blocks"]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    if layers == "loop" and not _changes_shape(config, sizes):
        cut = jax.jit(partial(_to_stacks, config, sizes, layers), out_shardings=shardings, donate_argnums=0)
        return params | {"blocks": cut(params["blocks"])}
    # Buffers of other shapes cannot be donated. Parameter by parameter, only one is in memory twice at a time.
    paths, tree = jax.tree_util.tree_flatten_with_path(params["blocks"])
    columns = []
    for (path, leaf), *own in zip(paths, *map(jax.tree.leaves, shardings), strict=True):
        cut = jax.jit(partial(_cut, config, sizes, layers, path), out_shardings=tuple(own))
        columns.append(cut(leaf))
        leaf.delete()
    return params | {"blocks": tuple(jax.tree.unflatten(tree, stack) for stack in zip(*columns, strict=True))}


def stack_sizes(config: ModelConfig, *, num_ranks: int, layers: LayerLoop) -> tuple[int, ...]:
    """Return the number of layers in each array of a stage's parameters: all layers, or one each.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    room = max(layers_of_stages(config, num_ranks=num_ranks))
    return (room,) if layers == "loop" else (1,) * room


def served_config(config: ModelConfig, sizes: MeshSpec) -> ModelConfig:
    """Return the config with at least one key/value head for each device of a tensor group."""
    return replace(config, num_kv_heads=max(config.num_kv_heads, sizes.tensor))


def layers_of_stages(config: ModelConfig, *, num_ranks: int) -> tuple[int, ...]:
    """Return the number of layers of each stage that spreads the bytes read per token evenly.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    # Decoding is bound by memory: the head counts as the number of layers whose weights have the bytes of its table.
    head = config.vocab_size * config.hidden_size / param_counts(config).block
    return balance_layers(config.num_layers, num_stages=num_ranks, last_extra=head if num_ranks > 1 else 0.0)


def _to_stacks(config: ModelConfig, sizes: MeshSpec, layers: LayerLoop, blocks: Any) -> tuple[Any, ...]:
    """Cut the parameters of all layers, [L, ...], into one tree of arrays [P, layers, ...] for each stack."""
    paths, tree = jax.tree_util.tree_flatten_with_path(blocks)
    cut = [_cut(config, sizes, layers, path, leaf) for path, leaf in paths]
    return tuple(jax.tree.unflatten(tree, stack) for stack in zip(*cut, strict=True))


def _cut(config: ModelConfig, sizes: MeshSpec, layers: LayerLoop, path: Any, leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Cut one parameter of all layers, [L, ...], into arrays [P, layers, ...]."""
    num_ranks = sizes.pipe
    copies = served_config(config, sizes).num_kv_heads // config.num_kv_heads
    if copies > 1 and any(getattr(key, "key", None) in _KV for key in path):
        # 2 heads over 4 devices become k0 k0 k1 k1, so each device has the head that its query heads read.
        heads = leaf.reshape(*leaf.shape[:-1], config.num_kv_heads, config.head_size)
        leaf = jnp.repeat(heads, copies, axis=-2).reshape(*leaf.shape[:-1], -1)
    counts = layers_of_stages(config, num_ranks=num_ranks)
    stages = stages_from_layers(leaf, num_ranks=num_ranks, layers_per_stage=counts)[0]
    stacks = stack_sizes(config, num_ranks=num_ranks, layers=layers)
    return tuple(stages[:, index * size : (index + 1) * size] for index, size in enumerate(stacks))


def _changes_shape(config: ModelConfig, sizes: MeshSpec) -> bool:
    """Return whether stages need padding or key/value heads are repeated."""
    counts = layers_of_stages(config, num_ranks=sizes.pipe)
    return len(set(counts)) > 1 or served_config(config, sizes) != config


def _split_over_pipe(own: NamedSharding, shape: tuple[int, ...], *, pipe: str) -> NamedSharding:
    """Return the sharding of a stack of layers with one more dimension over pipe: the layers, if pipe divides them."""
    spec = split_first_free_dim(own.spec, shape=shape, axis=pipe, size=own.mesh.shape[pipe])
    return NamedSharding(own.mesh, spec)


def _abstract_model(config: ModelConfig, rules: ShardingRules) -> Transformer:
    return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple)
