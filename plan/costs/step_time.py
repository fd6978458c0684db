"""How long one training step takes: stages through the schedule, then sums over data and the optimizer.

Read `memory_model.py` for what it needs, `../search.py` for how layouts are compared.
"""

from dataclasses import dataclass

from ...layers import ModelConfig, flops_per_token
from ..machines.topology import Topology
from .data_time import DataTime, data_time
from .layer_time import LayerTime, layer_time
from .layouts import Layout
from .pipeline_time import AutoTerms, auto_terms, pipeline_time_s
from .program import TRELLAX, Program
from .stage_time import EndCosts, end_costs, stage_layers, stage_times


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step and what they are made of; `bubble_fraction` is the idle share of the pipeline's time.

    `tensor_s` are exposed collectives of the tensor axis on the slowest rank, part of `pipeline_s`; `data_s` exposed
    sums over data; `mfu` the model flops (all scores counted, nothing recomputed) over what the peaks would do.
    """

    time_s: float
    pipeline_s: float
    tensor_s: float
    data_s: float
    optimizer_s: float
    bubble_fraction: float
    tokens_per_s: float
    mfu: float


def step_time(
    model: ModelConfig,
    *,
    layout: Layout,
    topology: Topology,
    num_tokens: int,
    program: Program = TRELLAX,
    layer: LayerTime | None = None,
) -> StepTime:
    """Return the time of a training step on sequences of `num_tokens` tokens.

    Args:
        layer: the layer's time if it is known already; many layouts share one.
    """
    if layer is None:
        layer = layer_time(model, layout=layout, program=program, topology=topology, num_tokens=num_tokens)
    ends = end_costs(model, layout=layout, program=program, topology=topology, num_tokens=num_tokens)
    layers = stage_layers(model, layout)
    auto = auto_terms(model, layout=layout, num_tokens=num_tokens, vocab=program.vocab)
    pipeline_s, busy = _pipeline_s(layer, ends, layers, layout=layout, program=program, auto=auto)
    of_rank = sum(layers[:: layout.pipe])
    data = data_time(model, layout=layout, program=program, topology=topology, num_layers=of_rank)
    hiding = of_rank * layer.backward
    data_s = _exposed_data_s(data, layout=layout, program=program, pipeline_s=pipeline_s, backward=hiding)
    time_s = pipeline_s + data_s + data.optimizer
    tokens = layout.batch_size * num_tokens
    flops = flops_per_token(model, num_tokens=num_tokens, attention="full").training
    peak = topology.accelerator.peak_flops_per_s(model.dtype) * layout.num_devices
    return StepTime(
        time_s=time_s,
        pipeline_s=pipeline_s,
        tensor_s=layout.microbatches * of_rank * layer.exposed,
        data_s=data_s,
        optimizer_s=data.optimizer,
        bubble_fraction=max(0.0, 1 - busy / pipeline_s),
        tokens_per_s=tokens / time_s,
        mfu=tokens * flops / (time_s * peak),
    )


def _pipeline_s(
    layer: LayerTime,
    ends: EndCosts,
    layers: tuple[int, ...],
    *,
    layout: Layout,
    program: Program,
    auto: AutoTerms | None,
) -> tuple[float, float]:
    """Seconds of the pipeline, and those in which the mean rank is at work."""
    stages = stage_times(layer, layers=layers, ends=ends, program=program)
    pipeline_s = pipeline_time_s(
        stages,
        schedule=layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        clock=program.clock,
        vocab=program.vocab,
        transfer=ends.hop if program.clock == "lockstep" or program.pipe_overlap == "on" else 0.0,
        shared_loss=ends.shared_loss,
        auto=auto,
    )
    busy = layout.microbatches * (sum(stage.total for stage in stages) / layout.pipe + ends.shared_loss)
    return pipeline_s, busy


def _exposed_data_s(data: DataTime, *, layout: Layout, program: Program, pipeline_s: float, backward: float) -> float:
    """Seconds of sums over data that no computation hides."""
    if layout.fsdp > 1 or layout.zero == 3:
        if program.shard_overlap == "off":
            return data.gather + data.reduce + data.tied
        # Gathers run one layer ahead: whatever is longer sets the pace.
        return max(0.0, data.gather + data.reduce - pipeline_s) + data.tied
    whole = data.gather + data.reduce
    if program.data_overlap == "off":
        return whole + data.tied
    # Hidden behind the last microbatch's backward, but for the first layer's share.
    return max(whole - backward, whole / 16) + data.tied
