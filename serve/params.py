"""Shapes of a model's parameters for inference, in natural order and divided into pipeline stages.

A reader of a run folder or of Hugging Face files gets `param_shapes` and returns arrays of these shapes, of which each
device has read its part. `stage_params` divides them into stages, once. Parameters are in the compute dtype, so that no
step casts a weight; those of routers stay in float32. Read `stage.py` next.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers import ModelConfig, Transformer, model_rules, param_counts, param_dims
from ..layers.partitioning import param_dtype
from ..meshes import MeshAxes, ShardingRules, mesh_sizes
from ..meshes.axes import DEFAULT_AXES
from ..meshes.rules import split_first_free_dim
from ..pipeline import balance_layers, stages_from_layers
from ..pipeline.model.joined_block import JoinedBlock
from ..pipeline.model.trees import on_mesh
from .experts import check_experts_whole

LayerLoop = Literal["loop", "unrolled"]
"""Whether a rank runs its layers in one loop over stacked arrays, or each layer has its own arrays and code.

On a GPU, a matrix product cannot read a slice of an array at an index that is known only at run time: in a loop, XLA
first copies the weights of every layer, and decoding takes three times as long. A loop compiles faster, in the time of
one layer.
"""


def param_shapes(config: ModelConfig, *, mesh: Mesh, dtype: str | None = None, axes: MeshAxes = DEFAULT_AXES) -> Any:
    """Return shapes and shardings of a `Transformer`'s parameters in natural order, for a reader to fill.

    They are a tree {"embed", "blocks", "head"}, blocks [L@pipe, ...]. If pipe does not divide the number of layers, it
    splits the first other dimension that it divides.

    Args:
        dtype: dtype of all parameters but the weights of routers, which are float32 as in training; by default the
            compute dtype of the config.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.

    Raises:
        MeshError: an axis with several devices has no role.
        ModelError: heads, feed-forward features or vocabulary do not split over the mesh.
        ScheduleError: there are fewer layers than pipe stages.
        ServeError: an axis splits experts.
    """
    axes = mesh_sizes(mesh, axes=axes).roles
    check_experts_whole(mesh.shape, axes=axes)
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes))
    layers_of_stages(config, num_ranks=mesh.shape[axes.pipe])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def place(path: Any, dims: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        own = rules.sharding(dims, shape=leaf.shape, mesh=mesh, name=name)
        if dims[0] == "layer":
            own = _split_over_pipe(own, leaf.shape, pipe=axes.pipe)
        return jax.ShapeDtypeStruct(leaf.shape, param_dtype(dims, dtype or config.dtype), sharding=own)

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

    Embedding and head are replicated over pipe, although only the first and the last stage use them. Layers that read
    the same input are joined, as in a training step.
    """
    natural, block = param_shapes(config, mesh=mesh, dtype=dtype, axes=axes), block_on(mesh, config, axes=axes)
    stacks = jax.eval_shape(partial(_to_stacks, config, mesh.shape[axes.pipe], layers), natural["blocks"])
    joined = jax.eval_shape(lambda stacks: tuple(_join(block, mesh, axes.pipe, stack) for stack in stacks), stacks)
    shardings = _stage_shardings(block.joined_specs, mesh, axes.pipe)
    return natural | {"blocks": tuple(jax.tree.map(_place, stack, shardings) for stack in joined)}


def stage_params(
    params: Any, *, config: ModelConfig, mesh: Mesh, layers: LayerLoop = "loop", axes: MeshAxes = DEFAULT_AXES
) -> Any:
    """Divide parameters into stages, and join layers that read the same input; the blocks are donated.

    Unequal stages are padded with zeros. While they are joined, the layers of one stack are in memory twice.
    """
    block, num_ranks = block_on(mesh, config, axes=axes), mesh.shape[axes.pipe]
    shardings = _stage_shardings(block.own_specs, mesh, axes.pipe)
    if layers == "loop" and len(set(layers_of_stages(config, num_ranks=num_ranks))) == 1:
        cut = jax.jit(partial(_to_stacks, config, num_ranks, layers), out_shardings=(shardings,), donate_argnums=0)
        stacks = list(cut(params["blocks"]))
    else:
        stacks = _cut_one_by_one(params["blocks"], shardings, partial(_cut, config, num_ranks, layers))
    if block.own != block.joined:
        joined = _stage_shardings(block.joined_specs, mesh, axes.pipe)
        join = jax.jit(partial(_join, block, mesh, axes.pipe), out_shardings=joined)
        # Taken from the list, so that a stack is freed once it is joined.
        stacks = [join(stacks.pop(0)) for _ in range(len(stacks))]
    return params | {"blocks": tuple(stacks)}


def block_on(mesh: Mesh, config: ModelConfig, *, axes: MeshAxes = DEFAULT_AXES) -> JoinedBlock:
    """Return the structure of a block on a mesh, before and after layers are joined."""
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes))
    return JoinedBlock.on(mesh, config=config, rules=rules)


def stack_sizes(config: ModelConfig, *, num_ranks: int, layers: LayerLoop) -> tuple[int, ...]:
    """Return the number of layers in each array of a stage's parameters: all layers, or one each.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    room = max(layers_of_stages(config, num_ranks=num_ranks))
    return (room,) if layers == "loop" else (1,) * room


def layers_of_stages(config: ModelConfig, *, num_ranks: int) -> tuple[int, ...]:
    """Return the number of layers of each stage that spreads the bytes read per token evenly.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    # Decoding is bound by memory: the head counts as the number of layers whose weights have the bytes of its table.
    head = config.vocab_size * config.hidden_size / param_counts(config).block
    return balance_layers(config.num_layers, num_stages=num_ranks, last_extra=head if num_ranks > 1 else 0.0)


def _to_stacks(config: ModelConfig, num_ranks: int, layers: LayerLoop, blocks: Any) -> tuple[Any, ...]:
    """Cut the parameters of all layers, [L, ...], into one tree of arrays [P, layers, ...] for each stack."""
    leaves, tree = jax.tree.flatten(blocks)
    cut = [_cut(config, num_ranks, layers, leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, stack) for stack in zip(*cut, strict=True))


def _cut(config: ModelConfig, num_ranks: int, layers: LayerLoop, leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Cut one parameter of all layers, [L, ...], into arrays [P, layers, ...]."""
    counts = layers_of_stages(config, num_ranks=num_ranks)
    stages = stages_from_layers(leaf, num_ranks=num_ranks, layers_per_stage=counts)[0]
    stacks = stack_sizes(config, num_ranks=num_ranks, layers=layers)
    return tuple(stages[:, index * size : (index + 1) * size] for index, size in enumerate(stacks))


def _cut_one_by_one(blocks: Any, shardings: Any, cut: Callable[[jax.Array], tuple[jax.Array, ...]]) -> list[Any]:
    """Cut parameters and delete them. Buffers of other shapes cannot be donated; so, only one is in memory twice."""
    leaves, tree = jax.tree.flatten(blocks)
    columns = []
    for leaf, own in zip(leaves, jax.tree.leaves(shardings), strict=True):
        columns.append(jax.jit(cut, out_shardings=own)(leaf))
        leaf.delete()
    return [jax.tree.unflatten(tree, stack) for stack in zip(*columns, strict=True)]


def _join(block: JoinedBlock, mesh: Mesh, pipe: str, stack: Any) -> Any:
    """Join the layers of a stack [P, layers, ...] that read the same input."""
    own, joined = (on_mesh(_stage_specs(specs, pipe), mesh) for specs in (block.own_specs, block.joined_specs))
    join = jax.vmap(jax.vmap(block.join))
    return jax.shard_map(join, mesh=mesh, in_specs=(own,), out_specs=joined)(stack)


def _stage_specs(specs: Any, pipe: str) -> Any:
    """Return the specs of [P@pipe, layers, ...], given those of one layer."""
    return jax.tree.map(lambda spec: PartitionSpec(pipe, None, *spec), specs, is_leaf=_is_spec)


def _stage_shardings(specs: Any, mesh: Mesh, pipe: str) -> Any:
    return jax.tree.map(partial(NamedSharding, mesh), _stage_specs(specs, pipe), is_leaf=_is_spec)


def _place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _split_over_pipe(own: NamedSharding, shape: tuple[int, ...], *, pipe: str) -> NamedSharding:
    """Return the sharding of a stack of layers with one more dimension over pipe: the layers, if pipe divides them."""
    spec = split_first_free_dim(own.spec, shape=shape, axis=pipe, size=own.mesh.shape[pipe])
    return NamedSharding(own.mesh, spec)


def _is_dims(node: Any) -> bool:
    return isinstance(node, tuple)


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
