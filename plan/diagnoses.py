"""Diagnose a plan: common mistakes of a layout, each with the number that shows it and a fix.

Read `suggestions.py` for the fixes, `training_search.py` for how layouts are priced.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal

from ..meshes.axes import EXPERT_ROLES
from ..pipeline.model.balance import layer_times
from .costs.layout import Layout
from .costs.pipeline_time import find_placement
from .costs.stage_time import stage_layers
from .plan import Plan
from .suggestions import (
    Change,
    closer_experts,
    even_pipes,
    fuller_pipes,
    layout_change,
    narrower_tensor,
    suggest_faster,
    suggest_smaller,
)
from .training_search import TrainQuestion, layout_memory, price_layout

Severity = Literal["error", "warning", "note"]

_GB = 1e9
# Thresholds, as shares of the step or of memory; `_UNEVEN_SHARE` is the largest rank over the mean.
_IDLE_SHARE = 0.2
_EXPECTED_SHARE = 0.05
_UNEVEN_SHARE = 1.1
_TENSOR_SHARE = 0.3
_DATA_SHARE = 0.2
_SAVED_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A mistake of a layout: `number` is the measure that shows it, in the unit of the message.

    `fix` is in words; `change` has the config keys that it sets, and is empty if there are none.
    """

    name: str
    severity: Severity
    number: float
    message: str
    fix: str
    change: Change = field(default_factory=dict)


def diagnose(question: TrainQuestion, plan: Plan) -> list[Diagnosis]:
    """Return the mistakes of a training plan, errors first; of an inference plan only those of its prediction."""
    checks = _CHECKS if plan.step is not None else (_check_precision,)
    found = [diagnosis for check in checks for diagnosis in check(question, plan)]
    order = ("error", "warning", "note")
    return sorted(found, key=lambda diagnosis: order.index(diagnosis.severity))


def _check_fit(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a layout that the device, or XLA, has no memory for."""
    needs, limit = plan.memory.total, question.device_limit
    if needs <= question.memory_limit:
        return
    suggestion = suggest_smaller(question, plan)
    if needs > limit:
        yield Diagnosis(
            name="out-of-memory",
            severity="error",
            number=needs / _GB,
            message=f"needs {needs / _GB:.1f} GB a device, and {limit / _GB:.1f} GB may be used",
            fix=suggestion.text,
            change=suggestion.change,
        )
    else:
        yield Diagnosis(
            name="over-xla-limit",
            severity="warning",
            number=needs / _GB,
            message=f"needs {needs / _GB:.1f} GB a device, and XLA plans for {question.memory_limit / _GB:.1f} GB: "
            "beyond it computes again what it could keep, and collectives wait, which is not priced",
            fix=suggestion.text,
            change=suggestion.change,
        )


def _check_precision(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find narrow matrix products, and say why their gain is not priced, not to be had, or not proved."""
    narrow, device = question.model.matmuls, question.topology.accelerator
    if narrow == "plain":
        return
    wide = "set model.matmuls='plain'."
    if plan.step is None:
        name, fix = "priced-as-bfloat16", "take times as upper bounds."
        message = f"model.matmuls={narrow!r} is priced as bfloat16 in serving"
    elif not device.flops_per_s.get("float8"):
        name, fix = "no-narrow-units", wide
        message = (
            f"model.matmuls={narrow!r} on {device.name}, which multiplies in 16 bits: casts cost time and save none"
        )
    else:
        # benchmarks/RESULTS.md, "On one H100": 916 ms, where this planner says 776 and bfloat16 takes 861 to 874.
        name, fix = "narrow-gain-not-seen", f"time a few steps both ways, or {wide}"
        message = (
            f"model.matmuls={narrow!r} is priced as faster, but on the only GPU that it ran on, an H100 with 1B "
            "parameters, a step took 5 to 7% longer than in bfloat16 (its products were written in float32 then)"
        )
    yield Diagnosis(name=name, severity="warning", number=0.0, message=message, fix=fix)


def _check_tensor_links(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a tensor axis over slow links: PCIe, or the network between nodes."""
    topology, tensor = question.topology, plan.layout.tensor
    if tensor == 1 or plan.step is None:
        return
    share = plan.step.tensor_s / plan.time_s
    node = topology.devices_per_node
    if tensor > node:
        name, where, waits = "tensor-across-nodes", f"tensor={tensor} spans nodes of {node}", " on the network"
    elif node % tensor:
        name, where, waits = "slow-axis-on-fast-link", f"groups of tensor={tensor} straddle nodes", " on the network"
    elif topology.accelerator.link == "pcie":
        name, where, waits = "tensor-over-pcie", f"tensor={tensor} talks over PCIe", ""
    else:
        return
    otherwise = "expect it: no mesh of these devices with a smaller tensor axis fits and is faster."
    suggestion = suggest_faster(question, plan, narrower_tensor(question, plan.layout), otherwise=otherwise)
    yield Diagnosis(
        name=name,
        severity="warning",
        number=share,
        message=f"{where}: {share:.0%} of the step waits for its collectives{waits}",
        fix=suggestion.text,
        change=suggestion.change,
    )


def _check_expert_links(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find experts that are split over several nodes."""
    layout, node = plan.layout, question.topology.devices_per_node
    span = layout.expert * layout.expert_stride
    if layout.expert == 1 or plan.step is None or node % span == 0:
        return
    share, over = plan.step.tensor_s / plan.time_s, layout.mesh.label(*EXPERT_ROLES)
    otherwise = "expect it: no split of the experts within a node fits and is faster."
    suggestion = suggest_faster(question, plan, closer_experts(question, layout), otherwise=otherwise)
    yield Diagnosis(
        name="experts-across-nodes",
        severity="warning",
        number=share,
        message=f"groups of {over}={layout.expert} span nodes of {node}: {share:.0%} of the step waits for collectives "
        "of the layers",
        fix=suggestion.text,
        change=suggestion.change,
    )


def _check_tensor_width(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a tensor axis that spends much of the step on communication inside a node."""
    tensor, node = plan.layout.tensor, question.topology.devices_per_node
    if plan.step is None or tensor == 1 or tensor > node or question.topology.accelerator.link == "pcie":
        return
    share = plan.step.tensor_s / plan.time_s
    if share > _TENSOR_SHARE:
        otherwise = "expect it: no mesh of these devices with a smaller tensor axis fits and is faster."
        suggestion = suggest_faster(question, plan, narrower_tensor(question, plan.layout), otherwise=otherwise)
        yield Diagnosis(
            name="tensor-too-wide",
            severity="warning",
            number=share,
            message=f"tensor={tensor} is wide for hidden size {question.model.hidden_size}: {share:.0%} of the step is "
            "its communication",
            fix=suggestion.text,
            change=suggestion.change,
        )


def _check_bubble(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a pipeline that is idle for much of the step, or say what its bubble is."""
    layout, idle = plan.layout, plan.bubble_fraction
    if layout.pipe == 1:
        return
    least = (layout.pipe - 1) / (layout.microbatches + layout.pipe - 1)
    suggestion = suggest_faster(
        question,
        plan,
        fuller_pipes(question, layout) if idle > _IDLE_SHARE else (),
        otherwise="raise train.batch_size, or lower mesh.pipe: no schedule of this batch on this mesh is faster.",
    )
    if layout.is_backward_split and idle > max(_IDLE_SHARE, 2 * least):
        # In lockstep every rank waits for the longest action, and an input gradient that recomputes outlasts a forward.
        yield Diagnosis(
            name="uneven-turns",
            severity="warning",
            number=idle,
            message=f"schedule {layout.schedule!r} leaves {layout.pipe} ranks idle {idle:.0%} of the time: a turn "
            f"lasts as long as its longest action; 1f1b's equal stages are idle {least:.0%}",
            fix=suggestion.text,
            change=suggestion.change,
        )
    elif idle > _IDLE_SHARE:
        yield Diagnosis(
            name="too-few-microbatches",
            severity="warning",
            number=idle,
            message=f"{layout.microbatches} microbatches leave {layout.pipe} ranks idle {idle:.0%} of the time",
            fix=suggestion.text,
            change=suggestion.change,
        )
    elif idle > _EXPECTED_SHARE:
        yield Diagnosis(
            name="bubble-in-expectation",
            severity="note",
            number=layout.pipe * (1 - idle),
            message=f"pipe={layout.pipe} does the work of {layout.pipe * (1 - idle):.1f} ranks: {idle:.1%} is bubble",
            fix=f"expect {layout.pipe * (1 - idle):.1f} times one device, not {layout.pipe}.",
        )


def _check_balance(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find stages with more layers than the mean."""
    layout = plan.layout
    if layout.pipe == 1:
        return
    layers = stage_layers(question.model, layout, runtime=question.priced_runtime)
    placement = find_placement(
        question.model, layout=layout, num_tokens=question.num_tokens, runtime=question.priced_runtime
    )
    times, until = layer_times(question.model, num_tokens=question.num_tokens), list(accumulate(layers))
    stages = [sum(times[end - count : end]) for end, count in zip(until, layers, strict=True)]
    ranks = [sum(stages[stage] for stage in placement.stages_of(rank)) for rank in range(layout.pipe)]
    # The largest rank over the mean, since a tick lasts as long as its slowest rank.
    uneven = max(ranks) * layout.pipe / sum(ranks)
    if uneven > _UNEVEN_SHARE:
        otherwise = "expect it: no even mesh of these devices fits and is faster."
        suggestion = suggest_faster(question, plan, even_pipes(question, layout), otherwise=otherwise)
        yield Diagnosis(
            name="unbalanced-stages",
            severity="warning",
            number=uneven,
            message=f"the largest rank has {max(ranks):g} layers, the mean {sum(ranks) / layout.pipe:.1f}: every tick "
            f"lasts {uneven:.2f} times as long",
            fix=suggestion.text,
            change=suggestion.change,
        )


def _check_data(_: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a data axis that spends much of the step on summing gradients."""
    if plan.step is None or plan.layout.data == 1:
        return
    share = plan.step.data_s / plan.time_s
    if share > _DATA_SHARE:
        layout = plan.layout
        shard = layout.microbatches * layout.sequences
        shards = f"data={layout.data // layout.data_expert}"
        shards += f" x expert={layout.data_expert}" * (layout.data_expert > 1)
        yield Diagnosis(
            name="batch-too-small",
            severity="warning",
            number=share,
            message=f"{shard} sequences on each of {shards}: {share:.0%} of the step sums gradients",
            fix="raise train.batch_size, or lower mesh.data.",
        )


def _check_need(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find a split model that data parallelism alone would train faster."""
    layout = plan.layout
    if layout.tensor * layout.pipe * layout.context == 1 or question.batch_size % layout.num_devices:
        return
    alone = Layout(
        data=layout.num_devices,
        microbatches=question.batch_size // layout.num_devices,
        remat=layout.remat,
        zero=1 if layout.zero else 0,
    )
    needs = layout_memory(question, alone).total
    if needs > question.memory_limit:
        return
    other = price_layout(question, alone)
    if other.time_s < plan.time_s:
        change = layout_change(layout, alone)
        yield Diagnosis(
            name="needless-parallelism",
            severity="warning",
            number=needs / _GB,
            message=f"the model fits one device ({needs / _GB:.1f} GB), and data={layout.num_devices} alone is "
            f"{plan.time_s / other.time_s:.2f} times as fast",
            fix=f"set {', '.join(f'{key}={value!r}' for key, value in change.items())}.",
            change=change,
        )


def _check_remat(question: TrainQuestion, plan: Plan) -> Iterator[Diagnosis]:
    """Find activations that full rematerialization would make much smaller."""
    if plan.layout.remat == "full":
        return
    full = layout_memory(question, replace(plan.layout, remat="full"))
    saved = plan.memory.total - full.total
    if saved > _SAVED_SHARE * question.memory_limit:
        yield Diagnosis(
            name="remat-would-save",
            severity="note",
            number=saved / _GB,
            message=f"activations take {plan.memory.activations / _GB:.1f} GB, of which remat full would save "
            f"{saved / _GB:.1f} GB",
            fix="set pipeline.remat='full', and use the memory for larger microbatches.",
            change={"pipeline.remat": "full"},
        )


_CHECKS: tuple[Callable[[TrainQuestion, Plan], Iterator[Diagnosis]], ...] = (
    _check_fit,
    _check_precision,
    _check_tensor_links,
    _check_expert_links,
    _check_tensor_width,
    _check_bubble,
    _check_balance,
    _check_data,
    _check_need,
    _check_remat,
)
