"""Compute the time of one training step: the pipeline by its schedule, then the update.

Read `memory_model.py` for the memory of a step, `../training_search.py` for how layouts are compared.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...layers import ModelConfig, flops_per_token
from ...layers.experts.kinds import layer_kinds
from ...schedules import StageCost
from ..machines.topology import Topology
from .device_params import ends_of
from .held_layers import KindCounts, held_layers, kinds_of_stages
from .host_residuals import residual_copies_s
from .layer_time import LayerTime, layer_time, sum_times
from .layout import Layout
from .memory_model import kept_bytes
from .pipeline_time import find_placement, pipeline_time_s, search_terms
from .runtime import Runtime, trellax_runtime
from .stage_time import EndCosts, end_costs, stage_layers, stage_times
from .update_time import UpdateTime, find_gathers, update_time


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step and their parts: `time_s` is `pipeline_s` + `data_s` + `optimizer_s` + `host_s`.

    `tensor_s` is the part of `pipeline_s` in which the slowest rank waits for collectives over tensor; `data_s` is the
    exposed reduction of gradients and all-gather of parameters; `optimizer_s` has the copies of moments from the host
    and back, `host_s` those of residuals that nothing hides; `bubble_fraction` is the idle share of the pipeline.
    `mfu` is model flops utilization: the flops of the model, with all attention scores and without recomputation, over
    those of the devices' peak.
    """

    time_s: float
    pipeline_s: float
    tensor_s: float
    data_s: float
    optimizer_s: float
    host_s: float
    bubble_fraction: float
    tokens_per_s: float
    mfu: float


LayerTimes = dict[ModelConfig, LayerTime]
"""Time of a layer of each kind, by its config."""


def layer_times(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, topology: Topology, num_tokens: int
) -> LayerTimes:
    """Return the time of a layer of each kind of a model.

    Raises:
        PlanError: `num_tokens` is below 1.
    """
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "topology": topology, "num_tokens": num_tokens}
    return {kind.config: layer_time(kind.config, **given) for kind in layer_kinds(model)}


def step_time(
    model: ModelConfig,
    *,
    layout: Layout,
    topology: Topology,
    num_tokens: int,
    runtime: Runtime | None = None,
    layer: LayerTimes | None = None,
) -> StepTime:
    """Return the time of a training step on sequences of `num_tokens` tokens.

    `runtime` is that of `trellax_runtime` if left out; `layer` is the time of a layer of each kind, if known already.

    Raises:
        TrellaxError: `num_tokens` is below 1, or the layout's schedule is unknown or cannot run.
    """
    runtime = runtime or trellax_runtime(model, topology.accelerator)
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens}
    times = layer or layer_times(model, **given, topology=topology)
    ends = end_costs(model, **given, topology=topology)
    layers, placement = stage_layers(model, layout, runtime=runtime), find_placement(model, **given)
    of_stages = [sum_times((times[kind], count) for kind, count in own) for own in kinds_of_stages(model, layers)]
    stages = stage_times(of_stages, ends=ends, runtime=runtime, placement=placement)
    pipeline_s, busy = _pipeline_s(model, stages, ends, **given, num_nodes=topology.num_nodes)
    own, held = held_layers(model, layers, stages=placement.stages_of(0)), ends_of(placement, 0)
    rank = sum_times((of_stages[stage], 1) for stage in placement.stages_of(0))
    on: dict[str, Any] = {"layout": layout, "runtime": runtime, "topology": topology}
    data = update_time(model, **on, layers=own.stored, ends=held, rounds=find_gathers(model, **given).rounds)
    data_s = data_time_s(data, **on, layers=model.num_layers, pipeline_s=pipeline_s, backward=rank.backward)
    copies_s = _copies_s(kinds_of_stages(model, layers), of_stages, **given, topology=topology)
    parts = {"pipeline_s": pipeline_s, "data_s": data_s, "optimizer_s": data.optimizer, "host_s": copies_s}
    time_s = sum(parts.values())
    return StepTime(
        **parts,
        time_s=time_s,
        tensor_s=layout.microbatches * rank.exposed,
        bubble_fraction=max(0.0, 1 - busy / pipeline_s),
        tokens_per_s=layout.batch_size * num_tokens / time_s,
        mfu=_mfu(model, layout=layout, topology=topology, num_tokens=num_tokens, time_s=time_s),
    )


def _copies_s(
    kinds: Sequence[KindCounts],
    times: Sequence[LayerTime],
    *,
    layout: Layout,
    runtime: Runtime,
    num_tokens: int,
    topology: Topology,
) -> float:
    """Return the seconds in which copies of residuals hold up the stages, of these layers and their times."""
    if layout.offload != "residuals":
        return 0.0
    kept = max(kept_bytes(own, layout=layout, runtime=runtime, num_tokens=num_tokens) for own in kinds)
    return residual_copies_s(layout, topology=topology, kept=kept, backward=max(own.backward for own in times))


def _pipeline_s(
    model: ModelConfig,
    stages: tuple[StageCost, ...],
    ends: EndCosts,
    *,
    layout: Layout,
    runtime: Runtime,
    num_tokens: int,
    num_nodes: int,
) -> tuple[float, float]:
    """Return the seconds of the pipeline, and those in which the mean rank is busy."""
    pipeline_s = pipeline_time_s(
        stages,
        schedule=layout.schedule,
        num_ranks=layout.pipe,
        num_microbatches=layout.microbatches,
        traits=runtime.order_traits,
        # A blocking hop is part of the stages' own times already.
        transfer=0.0 if runtime.blocking_hops == "on" else ends.hop,
        shared_loss=ends.shared_loss,
        terms=search_terms(model, layout=layout, num_tokens=num_tokens, runtime=runtime),
    )
    busy = layout.microbatches * (sum(stage.total for stage in stages) / layout.pipe + ends.shared_loss)
    # Hosts that launch kernels one by one do not keep the same pace, and every layer waits for the slowest.
    slower = 1 + runtime.node_wait * math.log2(num_nodes)
    return slower * pipeline_s, slower * busy


def _mfu(model: ModelConfig, *, layout: Layout, topology: Topology, num_tokens: int, time_s: float) -> float:
    """Return the model flops of a step over those that all devices could do at their peak."""
    tokens = layout.batch_size * num_tokens
    flops = flops_per_token(model, num_tokens=num_tokens, attention="full").training
    peak = topology.accelerator.peak_flops_per_s(model.dtype) * layout.num_devices
    return tokens * flops / (time_s * peak)


def data_time_s(data: UpdateTime, *, topology: Topology, **given: Any) -> float:
    """Return the seconds that collectives over data add to a step: those not hidden, and what hidden ones slow down."""
    exposed_s = _exposed_data_s(data, **given)
    # Collectives that run beside products take cores from them.
    return exposed_s + topology.accelerator.collective_cores * max(0.0, data.sent - exposed_s)


def _exposed_data_s(
    data: UpdateTime, *, layout: Layout, runtime: Runtime, layers: int, pipeline_s: float, backward: float
) -> float:
    """Return the seconds of reductions and all-gathers over data that no computation hides."""
    if layout.splits_gradients:
        if runtime.shard_overlap == "off":
            return data.gather + data.reduce + data.tied
        # All-gathers run one layer ahead of the computation, so the longer of the two sets the pace. In trellax nothing
        # hides that of the first layer of a stage, and a reduction has the products of its own layer alone beside it,
        # half of which come before it.
        first = layout.pipe / layers * data.gather + data.reduce / 2 if runtime.residuals == "trellax" else 0.0
        if layout.gathers == "chunk":
            # The weights of a chunk are there before its first action begins: nothing runs beside their gather.
            first = data.gather + data.reduce / 2
        return max(first, data.gather + data.reduce - pipeline_s) + data.tied
    whole = data.gather + data.reduce
    if runtime.data_overlap == "off":
        return whole + data.tied
    # Hidden behind the last microbatch's backward, except the gradients of the first layer, which come last.
    return max(whole - backward, whole / 16) + data.tied
