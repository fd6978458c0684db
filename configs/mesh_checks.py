"""Check that the model, layers and batch of a run divide evenly over its mesh."""

from collections.abc import Callable, Iterator
from typing import Any

from ..layers import ModelConfig
from ..layers.context.choice import choose_context_attention
from ..layers.own.over_context import check_over_context
from ..meshes import ConfigError, MeshSpec, ModelError, ScheduleError, TrellaxError
from ..meshes.divisibility import check_divides, nearest_multiples
from ..pipeline import resolve_layers
from ..schedules import SCHEDULES
from .run_config import RunConfig

_MAX_FORWARDS = 50_000
_MAX_FORWARDS_OF_AUTO = 10_000
"""Largest stages x microbatches of a schedule that is built within about 20 seconds."""


def find_mesh_errors(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error for each size of a run that does not divide over a mesh, none of whose sizes is -1."""
    yield from _check_widths(config.model, mesh)
    yield from _check_depth(config, mesh)
    yield from errors_of(check_batch_splits, config, mesh)
    yield from errors_of(mesh.splits_tokens, config.data.seq_len)
    yield from _check_context(config, mesh)
    yield from _check_forwards(config, pipe=mesh.pipe)
    yield from _check_offload(config, mesh)
    yield from _check_noise_scale(config, mesh)


def check_batch_splits(config: RunConfig, mesh: MeshSpec) -> None:
    """Raise unless every microbatch has the same number of sequences on each data shard of the mesh.

    Raises:
        ConfigError: the batch size is not a multiple of microbatches x shards.
    """
    batch, microbatches, data = config.train.batch_size, config.pipeline.microbatches, mesh.data
    if batch % (microbatches * data):
        _, larger = nearest_multiples(batch, microbatches * data)
        raise ConfigError(
            f"train.batch_size={batch} does not split into pipeline.microbatches={microbatches} over "
            f"{_keys_of(mesh, *mesh.roles.batch)}={data}: "
            f"{batch} / ({microbatches} x {data}) = {batch / (microbatches * data):.2f} sequences a device and "
            "microbatch.",
            fix=f"set train.batch_size={larger}, or other microbatches.",
        )


def _check_widths(model: ModelConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error unless query heads and feed-forward split over tensor, and key/value heads split or replicate."""
    tensor, over = mesh.tensor, _keys_of(mesh, *mesh.roles.tensor)
    if model.block:
        # Sizes of its parameters are checked where they are made.
        yield from _check_experts(model, mesh)
        return
    split = [("num_heads", "heads are"), ("expert_size", "an expert is"), ("shared_size", "the shared experts are")]
    if model.dense_layers or not (model.num_experts or model.mlp_class):
        split.append(("ffn_size", "the feed-forward is"))
    for name, what in split:
        yield from errors_of(
            check_divides,
            f"model.{name}",
            getattr(model, name),
            over=over,
            parts=tensor,
            error=ModelError,
            rule=f"{what} divided evenly, but ",
        )
    yield from _check_experts(model, mesh)
    # 8 heads over 4 devices are 2 on each; 2 heads over 4 devices are each on 2; 3 over 4 is neither.
    kv = model.num_kv_heads
    if kv % tensor and tensor % kv:
        yield ModelError(
            f"model.num_kv_heads={kv} neither splits over {over}={tensor} nor can be copied evenly to it: "
            f"{max(kv, tensor)} / {min(kv, tensor)} = {max(kv, tensor) / min(kv, tensor):.2f}.",
            fix=f"make one a multiple of the other, for example {over}={kv}.",
        )


def _check_experts(model: ModelConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error unless experts split over the axes of that role."""
    if mesh.expert == 1:
        return
    axes = [axis for axis in mesh.roles.expert if mesh.sizes[axis] > 1]
    over = _keys_of(mesh, *axes)
    if not model.num_experts:
        ones = " and ".join(f"mesh.{axis}=1" for axis in axes)
        roles, own = dict(mesh.roles.roles), {"expert": "mesh.data", "context_expert": "mesh.context"}
        takers = " and ".join(own[roles[axis]] for axis in axes)
        yield ModelError(
            f"{over}={mesh.expert} splits experts, but model.num_experts=0: the model has none.",
            fix=f"set {ones}, whose devices {takers} may take, or model.num_experts=8 and model.experts_per_token=2, "
            "say.",
        )
    else:
        parts = {"over": over, "parts": mesh.expert, "error": ModelError}
        yield from errors_of(check_divides, "model.num_experts", model.num_experts, **parts)


def _check_depth(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error unless every stage has a layer and `layers_per_stage` sums to the layers of the model."""
    layers, chunks, pipe = config.model.num_layers, config.pipeline.chunks, mesh.pipe
    if pipe == 1:
        yield from _check_layers_of_one_rank(config)
        return
    stages = pipe * chunks
    key = f"mesh.{mesh.roles.pipe}"
    what = f"{key}={pipe}" if chunks == 1 else f"{key}={pipe} x pipeline.chunks={chunks} = {stages}"
    if layers < stages:
        yield ModelError(
            f"model.num_layers={layers} cannot fill {what} stages: a stage has at least one layer.",
            fix=f"set {key}={max(1, layers // chunks)} or less, or model.num_layers={stages} or more.",
        )
    elif not config.pipeline.schedule.endswith(".csv"):  # A file sets its own chunks, known once it is read.
        yield from errors_of(
            resolve_layers,
            config.model,
            num_ranks=pipe,
            num_chunks=chunks,
            layers_per_stage=config.pipeline.layers_per_stage,
            num_tokens=config.data.seq_len,
            vocab=config.pipeline.vocab,
        )


def _check_context(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error unless attention reaches all tokens of a sequence, and by heads where it is asked to."""
    yield from errors_of(check_over_context, config.model, context=mesh.context)
    how: dict[str, Any] = {"remat": config.pipeline.remat, "asked": config.pipeline.context_attention}
    if mesh.context > 1 and config.model.num_heads % mesh.tensor == 0:
        yield from errors_of(choose_context_attention, config.model, tensor=mesh.tensor, context=mesh.context, **how)


def _check_layers_of_one_rank(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error for a wrong `layers_per_stage` even with one rank: the run may be resumed on more."""
    layers, given = config.model.num_layers, config.pipeline.layers_per_stage
    if given != "auto" and (sum(given) != layers or min(given) < 1):
        shown = ",".join(map(str, given))
        yield ScheduleError(
            f"pipeline.layers_per_stage={shown} has {sum(given)} layers in {len(given)} stages, but "
            f"model.num_layers={layers}, and a stage has at least one.",
            fix=f"give counts whose sum is {layers}, or leave pipeline.layers_per_stage out.",
        )


def _check_forwards(config: RunConfig, *, pipe: int) -> Iterator[TrellaxError]:
    """Yield an error unless the schedule is small enough to be built in seconds."""
    name, chunks, microbatches = config.pipeline.schedule, config.pipeline.chunks, config.pipeline.microbatches
    is_searched = name in SCHEDULES and SCHEDULES[name].order == "searched"
    most = _MAX_FORWARDS_OF_AUTO if is_searched else _MAX_FORWARDS
    stages = pipe * chunks if pipe > 1 else 1
    if stages * microbatches > most:
        yield ScheduleError(
            f"pipeline.microbatches={microbatches} over {stages} stages are {stages * microbatches} forwards a step; "
            f"a schedule has at most {most}.",
            fix=f"set pipeline.microbatches={max(1, most // stages)} or less.",
        )


def _check_offload(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error if residuals are to wait on the host where none wait: each microbatch is done with at once."""
    if config.train.offload == "residuals" and mesh.pipe == 1:
        key = f"mesh.{mesh.roles.pipe}"
        yield ConfigError(
            f"train.offload='residuals' with {key}=1: without a pipeline a backward follows its forward at once, and "
            "no residuals wait for it.",
            fix=f"set {key}=2 or more, or train.offload='optimizer'.",
        )


def _check_noise_scale(config: RunConfig, mesh: MeshSpec) -> Iterator[TrellaxError]:
    """Yield an error unless each data shard has a gradient of its own, which is compared with that of the batch."""
    if config.train.noise_scale == "off":
        return
    over = _keys_of(mesh, *mesh.roles.batch)
    if mesh.context * mesh.expert > 1:
        axes = [*mesh.roles.context, *mesh.roles.expert]
        axis = next(f"mesh.{axis}" for axis in axes if mesh.sizes[axis] > 1)
        problem, fix = f"with {axis} above 1 no device has that of its own sequences", f"{axis}=1"
    elif mesh.data == 1:
        problem, fix = f"{over}=1 has one, that of the batch", f"{over}=2 or more"
    elif (shard := config.train.shard) in ("chunk", "layer"):
        problem, fix = (
            f"train.shard={shard!r} sums them over shards layer by layer",
            "train.shard='step' or 'optimizer'",
        )
    elif mesh.pipe > 1 and config.pipeline.vocab == "ends":
        problem = "pipeline.vocab='ends' sums those of embedding and head over pipeline ranks and shards at once"
        fix = "pipeline.vocab='split'"
    else:
        return
    yield ConfigError(
        f"train.noise_scale='on' compares gradients of data shards, and {problem}.",
        fix=f"leave train.noise_scale out, or set {fix}.",
    )


def _keys_of(mesh: MeshSpec, *axes: str) -> str:
    """Return the keys of axes of the mesh as one text: mesh.data, or mesh.replica x mesh.data."""
    return " x ".join(f"mesh.{axis}" for axis in mesh.sizes if axis in axes)


def errors_of(check: Callable[..., object], *args: Any, **options: Any) -> Iterator[TrellaxError]:
    """Call a check that raises, and yield its error if it does."""
    try:
        check(*args, **options)
    except TrellaxError as error:
        yield error
