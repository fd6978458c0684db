"""Cut our transformer into pipeline stages: embedding, runs of blocks, head.

    vocab="ends"    rank 0: embedding, blocks    rank 1: blocks    ...    rank p-1: blocks, head
    vocab="split"   every rank: a part of the embedding table, its blocks, a part of the head

With "ends" every rank holds the tables whole over pipe, and the end stages work on them alone. With "split" the tables
are split over pipe x tensor, and all ranks work on them together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...layers import Embedding, Head, ModelConfig, Remat, Transformer, param_dims
from ...layers.block import rematerialize
from ...layers.dropout import BranchNoise
from ...layers.experts.kinds import LayerKind, layer_kinds, layer_pattern
from ...layers.lora.check_config import ADAPTERS, TRAINED
from ...layers.lora.nf4 import is_nf4
from ...layers.own.over_context import check_over_context
from ...layers.vocabulary import resize_tables, stored_words
from ...meshes import DEFAULT_RULES, ScheduleError, ShardingError, ShardingRules
from ...meshes.arguments import check_choice
from ...schedules import Placement, Vocab
from ...schedules.placement import Shape
from ...schedules.vocab import check_vocab
from .joined_block import JoinedBlock
from .losses import LossFn, next_token_loss
from .own_block import own_layer, places_of
from .param_specs import layer_specs, split_over_batch
from .protocol import LayerInfo, Output
from .stack import check_layers, stages_from_layers
from .stage import Gather, PipelineParams, StageFns, Unroll

SplitWeights = Literal["none", Gather]
"""How often weights that are split over the batch axes are gathered; "none" keeps them whole."""

_SHARDED = ("kernel", "table")
"""Names of the parameters that are kept split over the batch axes; norms, biases and positions are small."""


@dataclass(frozen=True, kw_only=True)
class PipelinedModel:
    """A transformer cut into stages.

    fns: stage functions for `pipeline_grads`.
    params: shapes, dtypes and shardings of the parameters.
    shardings: a `NamedSharding` for every parameter.
    init: init(seed) returns the parameters, the same values on every mesh; every device computes only its own part.
    scores: scores(num_sequences) returns stage functions with metrics of each of so many sequences of a batch,
        `logprob` and `misses`: the log-likelihood of targets of weight above 0, and how many are not the likeliest.
    """

    fns: StageFns
    params: PipelineParams
    shardings: PipelineParams
    init: Callable[[int], PipelineParams]
    scores: Callable[[int], StageFns]


def split_transformer(
    config: ModelConfig,
    *,
    mesh: Mesh,
    num_chunks: int = 1,
    layers_per_stage: Sequence[int] | None = None,
    placement: Placement | Shape = "loop",
    vocab: Vocab = "ends",
    remat: Remat = "dots",
    unroll: Unroll = "off",
    shard: SplitWeights = "none",
    loss: LossFn = next_token_loss,
    rules: ShardingRules = DEFAULT_RULES,
) -> PipelinedModel:
    """Return the transformer of `config` cut into num_chunks x pipe stages, [chunks, ranks@pipe, layers, ...].

    Embedding and head are shared: whole over pipe, or tables [V@pipe+tensor, D]. A batch: tokens, targets, weights.

    Args:
        layers_per_stage: layers of each stage, equal if left out; unequal ones are padded with zeros.
        placement, vocab, unroll, loss: those of the schedule; whether layers are written out; see `losses.py`.
        shard, rules: how often weights split over batch axes are gathered; fitted by `layers.model_rules`.

    Raises:
        TrellaxError: an axis has no role, layers or a parameter do not split over theirs, or a class not over context.
    """
    rules = _place_vocab(rules, vocab, mesh)
    sizes = {"num_ranks": mesh.shape[rules.mesh_axes.pipe], "num_chunks": num_chunks}
    counts = check_layers(config.num_layers, layers_per_stage=layers_per_stage, **sizes)
    where = Placement.resolve(placement, **sizes)
    num_rows = stored_words(config.vocab_size, parts=rules.num_parts("vocab", mesh.shape))
    make_params = partial(_make_params, config, where, counts, num_rows)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
    shapes = jax.eval_shape(make_params, jax.ShapeDtypeStruct((), "uint32"))
    shardings = _shardings(_cut_dims(param_dims(model)), shapes, rules, mesh, shard)
    params = jax.tree.map(lambda shape, own: shape.update(sharding=own), shapes, shardings)
    own = replace(_stage_fns(model, remat, counts, mesh, loss), unroll=unroll, placement=where)
    fns = _keep_split(own, shard, shardings, config.dtype)
    init, scores = partial(_init, jax.jit(make_params, out_shardings=shardings)), partial(_score_fns, fns, model)
    return PipelinedModel(fns=fns, params=params, shardings=shardings, init=init, scores=scores)


def _place_vocab(rules: ShardingRules, vocab: Vocab, mesh: Mesh) -> ShardingRules:
    """Return the rules with the vocabulary split over pipe too, if it is "split"; on one rank it has no use."""
    check_vocab(vocab)
    rules.check_axes(mesh.shape)
    if missing := [axis for axis in rules.token_axes if axis not in rules.axes("vocab")]:
        raise ShardingError(
            f"tokens between layers are split over {' and '.join(missing)}, which does not split the vocabulary: every "
            "device would compute the whole loss.",
            fix="split vocab over it as well, or leave stream_tokens whole.",
        )
    if vocab == "ends" or mesh.shape[rules.mesh_axes.pipe] == 1:
        return rules
    # pipe outermost: rank r holds one range of the vocabulary, which tensor divides again.
    return rules.replace(vocab=(rules.mesh_axes.pipe, *rules.axes("vocab")))


def _init(make: Callable[[jax.Array], PipelineParams], seed: int) -> PipelineParams:
    # The seed is one number, sent once; jax_transfer_guard="disallow" is meant for transfers in the training loop.
    with jax.transfer_guard("allow"):
        return make(jnp.uint32(seed))


def _make_params(
    config: ModelConfig, where: Placement, counts: tuple[int, ...], num_rows: int, seed: jax.Array
) -> PipelineParams:
    model = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    sizes = {"num_ranks": where.num_ranks, "num_chunks": where.num_chunks}
    blocks = stages_from_layers(
        params["blocks"], layers_per_stage=counts, pattern=layer_pattern(config), placement=where, **sizes
    )
    shared = resize_tables({"embed": params["embed"], "head": params.get("head", {})}, num_rows)
    made = PipelineParams(stages=blocks, shared=shared)
    return _cast_frozen(config.dtype, made) if config.lora_rank else made


def _cast_frozen(dtype: str, params: PipelineParams) -> PipelineParams:
    """Return parameters with frozen kernels and tables in the compute dtype: no update needs more digits.

    Kernels of four bits stay as they are.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if getattr(path[-1], "key", None) in _SHARDED and not is_nf4(leaf) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _stage_fns(model: Transformer, remat: Remat, counts: tuple[int, ...], mesh: Mesh, loss: LossFn) -> StageFns:
    config, rules = model.config, model.head.rules
    check_over_context(config, context=math.prod(mesh.shape.get(axis, 1) for axis in rules.mesh_axes.having("context")))
    graphs: dict[str, Any] = {name: nnx.split(getattr(model, name))[0] for name in ("embed", "head")}

    def first(shared: Any, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        embed: Embedding = nnx.merge(graphs["embed"], shared["embed"])
        return embed(microbatch["tokens"], positions_BT=microbatch.get("positions"))

    def last(shared: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array]) -> Any:
        head: Head = nnx.merge(graphs["head"], shared["head"])
        return loss(head, x_BTD, microbatch, shared["embed"]["table"])

    layers, prepares, pattern = {}, {}, layer_pattern(config)
    for kind in layer_kinds(config):
        block = JoinedBlock.on(mesh, config=kind.config, rules=rules)
        layers[kind.name] = rematerialize(_layer_fn(kind, block), remat)
        prepares[kind.name] = _prepare_fn(config.dtype, block)
    return StageFns(
        first=first,
        layer=layers if pattern else layers[""],
        pattern=pattern,
        token_axes=rules.token_axes,
        axes=rules.mesh_axes,
        batch_specs=_batch_specs(rules),
        last=last,
        # Left out for equal stages, which need no padding; with several kinds of layers each kind may be padded.
        layers_per_stage=counts if pattern or len(set(counts)) > 1 else None,
        num_layers=sum(counts),
        prepare=prepares if pattern else prepares[""],
        frozen=is_frozen if config.lora_rank else None,
    )


def _score_fns(fns: StageFns, model: Transformer, num_sequences: int) -> StageFns:
    """Return the functions with a `last` that adds the scores of each sequence to a metric, in its row.

    The metrics `logprob` and `misses` [num_sequences] are the log-likelihood of the targets of weight above 0, and how
    many of those are not the likeliest word.
    """
    graph: Any = nnx.split(model.head)[0]

    def last(shared: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array], info: LayerInfo) -> Output:
        head: Head = nnx.merge(graph, shared["head"])
        scores = head.scores(x_BTD, microbatch["targets"], embedding_VD=shared["embed"]["table"])
        counts_BT = microbatch["weights"] > 0
        logprob_B = jnp.where(counts_BT, scores.logprob, 0.0).sum(-1)
        misses_B = (counts_BT & ~scores.is_best).sum(-1, dtype=jnp.float32)
        # Rows of zeros for the sequences of others: metrics are added over microbatches and data shards.
        is_own_SB = jnp.arange(num_sequences)[:, None] == info.sequences[None]
        rows = [jnp.where(is_own_SB, own_B[None], 0.0).sum(-1) for own_B in (logprob_B, misses_B)]
        return Output(loss=-logprob_B.sum(), metrics=dict(zip(("logprob", "misses"), rows, strict=True)))

    return replace(fns, last=last)


def is_frozen(name: str) -> bool:
    """Return whether a parameter of a model with adapters is frozen, all but those of adapters."""
    return name.rpartition(".")[2] not in TRAINED


def _layer_fn(kind: LayerKind, block: JoinedBlock) -> Callable[..., Any]:
    """Return the function of a layer of one kind."""
    if kind.config.block:
        return own_layer(kind.config.block, block)

    def layer(params: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        return block.merge(params).run(x_BTD, places=places_of(microbatch))[0]

    def informed_layer(params: Any, x_BTD: jax.Array, microbatch: Any, info: LayerInfo) -> jax.Array:
        return block.merge(params).run(x_BTD, places=places_of(microbatch), **_told(kind.config, info))[0]

    def expert_layer(params: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array], info: LayerInfo) -> Output:
        told = _told(kind.config, info)
        y_BTD, stats = block.merge(params).run(x_BTD, microbatch["weights"], places_of(microbatch), **told)
        assert stats.loss is not None
        tokens_E = stats.metrics["expert_tokens"]
        # A row for each layer with experts, since metrics are added over layers.
        is_own = jnp.arange(kind.num_layers) == info.index - kind.first
        own = {"expert_tokens": is_own[:, None] * tokens_E[None], "router_loss": stats.loss}
        loads = {"expert_tokens": tokens_E} if kind.config.moves_router_bias else None
        return Output(x=y_BTD, loss=stats.loss, metrics={**stats.metrics, **own}, stats=loads)

    config = kind.config
    if config.num_experts:
        return expert_layer
    return informed_layer if config.dropout or config.stochastic_depth or config.attention_pattern else layer


def _told(config: ModelConfig, info: LayerInfo) -> dict[str, Any]:
    """Return what a layer is told of its place in the step: what it drops, and its number where layers differ."""
    return {"noise": _noise_of(config, info), "layer": info.index if config.attention_pattern else None}


def _noise_of(config: ModelConfig, info: LayerInfo) -> BranchNoise | None:
    """Return what a layer drops, None where nothing is: outside of training there is no random key.

    The share of branches that are left out grows with depth in a line, up to that of the config in the last layer
    (Huang et al. 2016, equation 4).
    """
    if info.key is None or not (config.dropout or config.stochastic_depth):
        return None
    left_out = config.stochastic_depth * (info.index + 1).astype("float32") / config.num_layers
    return BranchNoise(keys=info.keys(), dropout=config.dropout, left_out=left_out)


def _prepare_fn(dtype: str, block: JoinedBlock) -> Callable[[Any], Any] | None:
    """Return what casts kernels and joins those that read one input, or None if there is nothing to do.

    It runs once a step: inside the loop over layers both would be done again for every microbatch.
    """
    if dtype == "float32" and block.own == block.joined:
        return None
    return lambda params: _cast_kernels(dtype, block.join(params))


def _batch_specs(rules: ShardingRules) -> PartitionSpec | None:
    """Return how leaves [M, B, T] lie on the mesh; None for the default, where no axis splits tokens."""
    return rules.spec(("microbatch", "batch", "tokens")) if rules.axes("tokens") else None


def _cast_kernels(dtype: str, params: Any) -> Any:
    """Return parameters with kernels in the compute dtype. Norms compute in float32, and all else is small."""

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        is_used = getattr(path[-1], "key", None) in ("kernel", *ADAPTERS) and not is_nf4(leaf)
        return leaf.astype(dtype) if is_used else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _cut_dims(dims: dict[str, Any]) -> PipelineParams:
    """Return the logical dimensions of stage and shared parameters: blocks have chunk and stage before their own."""
    blocks = jax.tree.map(lambda own: ("chunk", "stage", *own), dims["blocks"], is_leaf=lambda n: isinstance(n, tuple))
    return PipelineParams(stages=blocks, shared={"embed": dims["embed"], "head": dims.get("head", {})})


def _keep_split(fns: StageFns, shard: SplitWeights, shardings: PipelineParams, dtype: str) -> StageFns:
    """Return the functions with how their parameters are kept, and how often they are gathered."""
    specs = layer_specs(shardings)
    fns = replace(fns, stage_specs=specs.stages, shared_specs=specs.shared)
    return fns if shard == "none" else replace(fns, gather=shard, gather_dtype=dtype)


def _shardings(
    dims: PipelineParams, shapes: PipelineParams, rules: ShardingRules, mesh: Mesh, shard: SplitWeights
) -> PipelineParams:
    check_choice("shard", shard, get_args(SplitWeights), error=ScheduleError)

    def place(path: Any, own: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return rules.sharding(own, shape=leaf.shape, mesh=mesh, name=name)

    whole = jax.tree_util.tree_map_with_path(place, dims, shapes, is_leaf=lambda node: isinstance(node, tuple))
    if shard == "none":
        return whole
    split = split_over_batch(whole, shapes, axes=rules.mesh_axes, names=_SHARDED)
    over = rules.mesh_axes.summed
    parts = math.prod(mesh.shape.get(axis, 1) for axis in over)
    if parts > 1 and jax.tree.leaves(split) == jax.tree.leaves(whole):
        raise ShardingError(
            f"shard={shard!r} keeps weights split over {' x '.join(over)}={parts}, but {parts} divides no dimension of "
            "a kernel or table that is not split already.",
            fix=f"use a hidden size that is a multiple of {parts}, or shard='none'.",
        )
    return split
