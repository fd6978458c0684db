"""Shapes of a model's parameters for inference, in natural order and divided into pipeline stages.

A reader of a run folder or of Hugging Face files gets `param_shapes` and returns arrays of these shapes, of which each
device has read its part. `stage_params` divides them into stages, once. Parameters are in the compute dtype, so that no
step casts a weight; those of routers stay in float32. Read `stage.py` next.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..layers import ModelConfig, Transformer, model_rules, param_dims
from ..layers.experts.kinds import LayerKind, layer_kinds
from ..layers.partitioning import param_dtype
from ..layers.quantized import SCALE, Weights, quantize_layers
from ..layers.vocabulary import natural_sharding, pad_tables
from ..meshes import MeshAxes, ShardingRules, mesh_sizes
from ..meshes.axes import DEFAULT_AXES
from ..meshes.rules import split_first_free_dim
from ..pipeline.model.joined_block import JoinedBlock
from ..pipeline.model.stack import cut_kind
from ..pipeline.model.trees import on_mesh
from ..schedules import Placement
from .stacks import LayerLoop, StageStack, layers_of_stages, stage_stacks

Stacks = tuple[StageStack, ...]


def param_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> Any:
    """Return shapes and shardings of a `Transformer`'s parameters in natural order, for a reader to fill.

    They are a tree {"embed", "blocks", "head"}, blocks [L@pipe, ...]. If pipe does not divide the number of layers, it
    splits the first other dimension that it divides. If tensor does not divide the vocabulary, it splits the features
    of its tables.

    Args:
        dtype: dtype of all parameters but the weights of routers, which are float32 as in training; by default the
            compute dtype of the config.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.
        weights: how the kernels of linear layers are held, see `load.py`.

    Raises:
        MeshError: an axis with several devices has no role.
        ModelError: heads, feed-forward features or experts do not split over the mesh.
        ScheduleError: there are fewer layers than pipe stages.
    """
    axes = mesh_sizes(mesh, axes=axes).roles
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes))
    layers_of_stages(config, num_ranks=mesh.shape[axes.pipe])
    model = nnx.eval_shape(lambda: _build(config, rules, weights))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def place(path: Any, dims: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        own = natural_sharding(path, dims, leaf, rules=rules, mesh=mesh)
        own = _split_over_pipe(own, leaf.shape, pipe=axes.pipe) if dims[0] == "layer" else own
        return jax.ShapeDtypeStruct(leaf.shape, _dtype_of(name, leaf, dims, dtype or config.dtype), sharding=own)

    return jax.tree_util.tree_map_with_path(place, param_dims(model), shapes, is_leaf=_is_dims)


def _dtype_of(name: str, leaf: Any, dims: tuple[str, ...], dtype: str) -> Any:
    """Return the dtype of a parameter; that of quantized kernels and of their scales does not depend on the model's."""
    return leaf.dtype if name.endswith(SCALE) or leaf.dtype != jnp.float32 else param_dtype(dims, dtype)


def _build(config: ModelConfig, rules: ShardingRules, weights: Weights) -> Transformer:
    model = Transformer(config, rngs=nnx.Rngs(0), rules=rules)
    quantize_layers(model.blocks, weights)
    return model


def weights_of(params: Any) -> Weights:
    """Return how the kernels of parameters in natural order are held."""
    leaves = jax.tree_util.tree_leaves_with_path(params["blocks"])
    names = {leaf.dtype.name for path, leaf in leaves if path[-1].key == "kernel"}
    return "int8" if "int8" in names else "fp8" if "float8_e4m3fn" in names else "plain"


def stage_shapes(
    config: ModelConfig,
    *,
    mesh: Mesh,
    dtype: str | None = None,
    layers: LayerLoop = "loop",
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> Any:
    """Return shapes and shardings of parameters in stages: blocks are a tuple of [P@pipe, layers, ...].

    Embedding and head are replicated over pipe, although only the first and the last stage use them. Layers that read
    the same input are joined, as in a training step. Tables are padded where tensor does not divide the vocabulary.
    """
    natural = param_shapes(config, mesh=mesh, dtype=dtype, axes=axes, weights=weights)
    blocks: list[Any] = []
    for kind, stacks in _stacks_by_kind(config, mesh=mesh, layers=layers, axes=axes):
        block = block_on(mesh, kind, model=config, axes=axes, weights=weights)
        cut = jax.eval_shape(partial(_to_stacks, stacks), _of_kind(natural["blocks"], kind))
        joined = jax.eval_shape(lambda cut, block=block: [_join(block, mesh, axes.pipe, stack) for stack in cut], cut)
        shardings = _stage_shardings(block.joined_specs, mesh, axes.pipe)
        blocks += [jax.tree.map(_place, stack, shardings) for stack in joined]
    return {"blocks": tuple(blocks), **_pad_ends(natural, mesh, axes)}


def _pad_ends(params: Any, mesh: Mesh, axes: MeshAxes) -> Any:
    """Return embedding and head with tables as the devices hold them."""
    ends = {name: params.get(name, {}) for name in ("embed", "head")}
    return pad_tables(ends, rules=ShardingRules.of(axes), mesh=mesh)


def stage_params(
    params: Any,
    *,
    config: ModelConfig,
    mesh: Mesh,
    layers: LayerLoop = "loop",
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> Any:
    """Divide parameters into stages, and join layers that read the same input; the blocks are donated.

    Unequal stages are padded with zeros. While they are joined, the layers of one stack are in memory twice.
    """
    blocks: list[Any] = []
    for kind, stacks in _stacks_by_kind(config, mesh=mesh, layers=layers, axes=axes):
        given = _of_kind(params["blocks"], kind)
        block = block_on(mesh, kind, model=config, axes=axes, weights=weights)
        blocks += _cut_kind(given, stacks, block, mesh=mesh, pipe=axes.pipe)
    return {"blocks": tuple(blocks), **_pad_ends(params, mesh, axes)}


def _cut_kind(blocks: Any, stacks: Stacks, block: JoinedBlock, *, mesh: Mesh, pipe: str) -> list[Any]:
    """Return the stacks of one kind of layer, joined."""
    shardings = _stage_shardings(block.own_specs, mesh, pipe)
    if len(stacks) == 1 and len(set(stacks[0].counts)) == 1:
        cut = jax.jit(partial(_to_stacks, stacks), out_shardings=(shardings,), donate_argnums=0)
        found = list(cut(blocks))
    else:
        found = _cut_one_by_one(blocks, shardings, partial(_cut, stacks))
    if block.own != block.joined:
        joined = _stage_shardings(block.joined_specs, mesh, pipe)
        join = jax.jit(partial(_join, block, mesh, pipe), out_shardings=joined)
        # Taken from the list, so that a stack is freed once it is joined.
        found = [join(found.pop(0)) for _ in range(len(found))]
    return found


def _stacks_by_kind(
    config: ModelConfig, *, mesh: Mesh, layers: LayerLoop, axes: MeshAxes
) -> list[tuple[LayerKind, Stacks]]:
    stacks = stage_stacks(config, num_ranks=mesh.shape[axes.pipe], layers=layers)
    return [(kind, tuple(stack for stack in stacks if stack.kind == kind)) for kind in layer_kinds(config)]


def _of_kind(blocks: Any, kind: LayerKind) -> Any:
    """Return the parameters of all layers of a kind."""
    return blocks[kind.name] if kind.name else blocks


def block_on(
    mesh: Mesh, kind: LayerKind, *, model: ModelConfig, axes: MeshAxes = DEFAULT_AXES, weights: Weights = "plain"
) -> JoinedBlock:
    """Return the structure of a kind of block of a model on a mesh, before and after layers are joined."""
    # The rules of the whole model: a mesh may split its experts, though a dense kind of layer has none.
    rules = model_rules(model, mesh.shape, rules=ShardingRules.of(axes))
    return JoinedBlock.on(mesh, config=kind.config, rules=rules, weights=weights)


def _to_stacks(stacks: Stacks, blocks: Any) -> tuple[Any, ...]:
    """Cut the parameters of all layers of a kind, [L, ...], into one tree of arrays [P, layers, ...] for each stack."""
    leaves, tree = jax.tree.flatten(blocks)
    cut = [_cut(stacks, leaf) for leaf in leaves]
    return tuple(jax.tree.unflatten(tree, stack) for stack in zip(*cut, strict=True))


def _cut(stacks: Stacks, leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Cut one parameter of all layers of a kind, [L, ...], into arrays [P, layers, ...]."""
    counts = stacks[0].counts
    stages = cut_kind(leaf, counts=counts, placement=Placement.of("loop", num_ranks=len(counts), num_chunks=1))[0]
    return tuple(stages[:, stack.first : stack.first + stack.size] for stack in stacks)


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
