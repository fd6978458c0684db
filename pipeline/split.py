"""Our transformer as pipeline stages: embedding first, equal runs of blocks, head last."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ..layers import Block, Embedding, Head, ModelConfig, Remat, Transformer, cross_entropy, param_dims, rematerialize
from ..meshes import DEFAULT_RULES, ScheduleError, ShardingRules
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
    remat: Remat = "none",
    rules: ShardingRules = DEFAULT_RULES,
) -> PipelinedModel:
    """Return the transformer of `config` cut into num_chunks x pipe stages of equally many layers.

    Stage parameters are [chunks, ranks@pipe, layers, ...]; embedding and head are shared, replicated over pipe.
    The values that `init` draws do not depend on the mesh.

    Batches are dicts of tokens, targets and weights, each [M, B@data, T].

    Args:
        rules: fitted to model and mesh by `layers.model_rules`.

    Raises:
        ScheduleError: the layers do not divide into the stages.
        ShardingError: a parameter does not split over its axis.
    """
    num_ranks = mesh.shape["pipe"]
    check_layers(config.num_layers, num_ranks=num_ranks, num_chunks=num_chunks)

    def born(seed: jax.Array) -> PipelineParams:
        model = Transformer(config, rngs=nnx.Rngs(params=jax.random.key(seed)), rules=rules)
        return _cut(nnx.to_pure_dict(nnx.state(model, nnx.Param)), num_chunks, num_ranks)

    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
    shapes = jax.eval_shape(born, jax.ShapeDtypeStruct((), "uint32"))
    shardings = _shardings(_cut_dims(param_dims(model)), shapes, rules, mesh)
    make = jax.jit(born, out_shardings=shardings)
    params = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)
    return PipelinedModel(
        fns=_stage_fns(model, remat), params=params, shardings=shardings, init=lambda seed: make(jax.numpy.uint32(seed))
    )


def check_layers(num_layers: int, *, num_ranks: int, num_chunks: int = 1) -> None:
    """Raise unless the layers divide into the stages: none may be dropped.

    Raises:
        ScheduleError: with the equation.
    """
    num_stages = num_ranks * num_chunks
    if num_layers < num_stages or num_layers % num_stages:
        what = f"{num_ranks} ranks" if num_chunks == 1 else f"{num_ranks} ranks x {num_chunks} chunks"
        raise ScheduleError(
            f"num_layers={num_layers} on {what} = {num_stages} stages: {num_layers} / {num_stages} = "
            f"{num_layers / num_stages:.2f} layers a stage.",
            fix=f"set num_layers={-(-num_layers // num_stages) * num_stages}, or choose a pipe size that divides "
            f"{num_layers}.",
        )


def natural_order(stages: Any) -> Any:
    """Return stage parameters [chunks, ranks, layers, ...] as [all layers, ...] in the order of the model."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[3:]), stages)


def _stage_fns(model: Transformer, remat: Remat) -> StageFns:
    graphs: dict[str, Any] = {name: nnx.split(getattr(model, name))[0] for name in ("embed", "blocks", "head")}

    def first(shared: Any, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        embed: Embedding = nnx.merge(graphs["embed"], shared["embed"])
        return embed(microbatch["tokens"])

    def layer(params: Any, x_BTD: jax.Array, _: Any) -> jax.Array:
        block: Block = nnx.merge(graphs["blocks"], params)
        return block(x_BTD)

    def last(shared: Any, x_BTD: jax.Array, microbatch: Mapping[str, jax.Array]) -> jax.Array:
        head: Head = nnx.merge(graphs["head"], shared["head"])
        logits_BTV = head(x_BTD, embedding_VD=shared["embed"]["table"])
        return cross_entropy(logits_BTV, microbatch["targets"], microbatch["weights"])

    return StageFns(first=first, layer=rematerialize(layer, remat), last=last)


def _cut(params: dict[str, Any], num_chunks: int, num_ranks: int) -> PipelineParams:
    blocks = jax.tree.map(lambda leaf: leaf.reshape(num_chunks, num_ranks, -1, *leaf.shape[1:]), params["blocks"])
    return PipelineParams(stages=blocks, shared={"embed": params["embed"], "head": params["head"]})


def _cut_dims(dims: dict[str, Any]) -> PipelineParams:
    blocks = jax.tree.map(lambda own: ("chunk", "stage", *own), dims["blocks"], is_leaf=lambda n: isinstance(n, tuple))
    return PipelineParams(stages=blocks, shared={"embed": dims["embed"], "head": dims["head"]})


def _shardings(dims: PipelineParams, shapes: PipelineParams, rules: ShardingRules, mesh: Mesh) -> PipelineParams:
    def place(path: Any, own: tuple[str, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return rules.sharding(own, shape=leaf.shape, mesh=mesh, name=name)

    return jax.tree_util.tree_map_with_path(place, dims, shapes, is_leaf=lambda node: isinstance(node, tuple))
