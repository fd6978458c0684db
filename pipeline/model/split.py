"""Our transformer as pipeline stages: embedding first, runs of blocks, head last.

Embedding and head are the ends of the pipeline; their tables are split over pipe x tensor, and all ranks work on them
together, or each rank holds them whole over pipe and the end stages work on them alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...layers import Block, Embedding, Head, ModelConfig, Remat, Transformer, param_dims
from ...layers.block import rematerialize
from ...meshes import DEFAULT_RULES, ScheduleError, ShardingRules
from ...meshes.arguments import check_choice
from ..schedules import Vocab
from ..schedules.vocab import check_vocab
from .stack import check_layers, stages_from_layers
from .stage import PipelineParams, StageFns


@dataclass(frozen=True, kw_only=True)
class PipelinedModel:
    """A transformer cut into stages: its functions, how its parameters are born, and where they live.

    `params` are shapes only; `init(seed)` makes the arrays, each device its own part.
    """

    fns: StageFns
    params: PipelineParams
    shardings: PipelineParams
    init: Callable[[int], PipelineParams]


def split_transformer(
    config: ModelConfig,
    *,
    mesh: Mesh,
    num_chunks: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    vocab: Vocab = "ends",
    remat: Remat = "dots",
    unroll: Literal["off", "on"] = "off",
    rules: ShardingRules = DEFAULT_RULES,
) -> PipelinedModel:
    """Return the transformer of `config` cut into num_chunks x pipe stages.

    Stage parameters are [chunks, ranks@pipe, layers, ...]; embedding and head are shared, replicated over pipe, but for
    tables [V@pipe+tensor, D] if `vocab` is "split". The values that `init` draws do not depend on the mesh.
    Batches are dicts of tokens, targets and weights, each [M, B@data, T].

    Args:
        layers_per_stage: layers of each stage, equal if left out; unequal stages are padded with zeros.
        vocab: as the schedule was made with: tables split over pipe too for all ranks, or for the end stages alone.
        unroll: whether the layers of a stage are written out or looped over.
        rules: fitted to model and mesh by `layers.model_rules`.

    Raises:
        ScheduleError: the layers do not divide into the stages, or `layers_per_stage` does not add up.
        ShardingError: a parameter does not split over its axis; for the vocabulary that is pipe x tensor.
    """
    _check_words(vocab, remat)
    num_ranks, layers = mesh.shape["pipe"], config.num_layers
    counts = check_layers(layers, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=layers_per_stage)
    if vocab == "split" and num_ranks > 1:
        rules = rules.replace(vocab=("pipe", *rules.axes("vocab")))
    born = partial(_born, config, num_ranks, num_chunks, counts)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
    shapes, dims = jax.eval_shape(born, jax.ShapeDtypeStruct((), "uint32")), _cut_dims(param_dims(model))
    shardings = _shardings(dims, shapes, rules, mesh)
    params = jax.tree.map(lambda a, s: a.update(sharding=s), shapes, shardings)
    fns = replace(_stage_fns(model, mesh, remat, counts, _shared_specs(dims.shared, rules)), unroll=unroll)
    init = partial(_init, jax.jit(born, out_shardings=shardings))
    return PipelinedModel(fns=fns, params=params, shardings=shardings, init=init)


def _init(make: Callable[[jax.Array], PipelineParams], seed: int) -> PipelineParams:
    # A single number, before anything runs: jax_transfer_guard="disallow" is meant for what a loop sends.
    with jax.transfer_guard("allow"):
        return make(jax.numpy.uint32(seed))


def _check_words(vocab: Vocab, remat: Remat) -> None:
    check_vocab(vocab)
    check_choice("remat", remat, get_args(Remat), error=ScheduleError)


def _born(
    config: ModelConfig, num_ranks: int, num_chunks: int, counts: tuple[int, ...], seed: jax.Array
) -> PipelineParams:
    model = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = stages_from_layers(params["blocks"], num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=counts)
    return PipelineParams(stages=blocks, shared={"embed": params["embed"], "head": params["head"]})


def _stage_fns(model: Transformer, mesh: Mesh, remat: Remat, counts: tuple[int, ...], shared_specs: Any) -> StageFns:
    graphs: dict[str, Any] = {name: nnx.split(getattr(model, name))[0] for name in ("embed", "head")}
    own, given = _graphs_of_block(model, mesh)

    def first(shared: Any, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        embed: Embedding = nnx.merge(graphs["embed"], shared["embed"])
        return embed(microbatch["tokens"])

    def layer(params: Any, x_BTD: jax.Array, _: Any) -> jax.Array:
        block: Block = nnx.merge(given, params)
        return block(x_BTD)

    def prepare(params: Any) -> Any:
        block: Block = nnx.merge(own, params)
        block.join()
        return _cast_kernels(model.config.dtype, nnx.to_pure_dict(nnx.state(block, nnx.Param)))

    def last(shared: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        head: Head = nnx.merge(graphs["head"], shared["head"])
        table_VD = shared["embed"]["table"]
        return head.loss(x_BTD, microbatch["targets"], microbatch["weights"], embedding_VD=table_VD)

    return StageFns(
        first=first,
        layer=rematerialize(layer, remat),
        last=last,
        layers_per_stage=counts if len(set(counts)) > 1 else None,
        num_layers=sum(counts),
        shared_specs=shared_specs,
        prepare=None if model.config.dtype == "float32" and own == given else prepare,
    )


def _graphs_of_block(model: Transformer, mesh: Mesh) -> tuple[Any, Any]:
    """The structure of a block as its parameters are kept, and as layers are given them on this mesh."""

    def make(columns: Literal["apart", "joined"]) -> Block:
        block = Block(model.config, rngs=nnx.Rngs(0), rules=model.rules)
        if columns == "joined":
            block.join()
        return block

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        apart, joined = (nnx.eval_shape(partial(make, columns)) for columns in ("apart", "joined"))
    return nnx.split(apart)[0], nnx.split(joined)[0]


def _cast_kernels(dtype: str, params: Any) -> Any:
    """Return parameters with their matrices in the compute dtype; all else is small, and norms compute in float32."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if getattr(path[-1], "key", None) == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _cut_dims(dims: dict[str, Any]) -> PipelineParams:
    blocks = jax.tree.map(lambda own: ("chunk", "stage", *own), dims["blocks"], is_leaf=lambda n: isinstance(n, tuple))
    return PipelineParams(stages=blocks, shared={"embed": dims["embed"], "head": dims["head"]})


def _shared_specs(dims: dict[str, Any], rules: ShardingRules) -> Any:
    """Over pipe alone, for `shard_map`: the compiler knows about the other axes. None if no table is split over it."""
    if "pipe" not in rules.axes("vocab"):
        return None

    def spec(own: tuple[str, ...]) -> PartitionSpec:
        return PartitionSpec(*("pipe" if "pipe" in rules.axes(dim) else None for dim in own))

    return jax.tree.map(spec, dims, is_leaf=lambda node: isinstance(node, tuple))


def _shardings(dims: PipelineParams, shapes: PipelineParams, rules: ShardingRules, mesh: Mesh) -> PipelineParams:
    def place(path: Any, own: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return rules.sharding(own, shape=leaf.shape, mesh=mesh, name=name)

    return jax.tree_util.tree_map_with_path(place, dims, shapes, is_leaf=lambda node: isinstance(node, tuple))
