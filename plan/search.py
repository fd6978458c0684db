"""The search for a training layout: all legal ones under the memory limit, cheapest first.

Every layout is priced with the pipeline in closed form; the best of each mesh are then simulated. Read `plans.py` for
what comes out, `serving_search.py` for inference.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..layers import ModelConfig
from ..meshes.errors import PlanError
from .layer_time import LayerTime, layer_time
from .layouts import Layout, PlanRemat, legal_layouts, legal_meshes
from .memory_model import MemoryUse, fullest, step_memory
from .pipeline_time import pipeline_time_s, screen_pipeline_s
from .plans import Plan, explain_plans, step_costs, step_traffic
from .program import TRELLAX, Program
from .step_time import step_time
from .topology import Topology

MEMORY_RESERVE = 0.06
"""Share of a device's memory left to the driver, to collectives and to gaps between buffers."""

_TOP = 5
_SIMULATED_ACTIONS = 10_000
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class TrainQuestion:
    """What is to be trained where: sequences of `num_tokens` tokens, `batch_size` of them a step."""

    model: ModelConfig
    topology: Topology
    batch_size: int
    num_tokens: int
    program: Program = TRELLAX
    remats: tuple[PlanRemat, ...] = ("none", "dots", "full")

    @property
    def memory_limit(self) -> float:
        """Bytes that a plan may use of each device."""
        return (1 - MEMORY_RESERVE) * self.topology.accelerator.memory_bytes


def search_train(question: TrainQuestion, *, objective: str = "train", top: int = _TOP) -> list[Plan]:
    """Return the best plans, one for each mesh, best first, each with the reason for its place.

    Meshes of all devices, of one node and of one device are tried, so the answer may be that fewer are enough.

    Args:
        objective: "train" for tokens/s, "memory" for the least memory of the fullest device.

    Raises:
        PlanError: nothing fits, with what would.
    """
    plans = [price_layout(question, layout, how="screen") for layout in _fitting(question)]
    if not plans:
        raise _nothing_fits(question)
    best = _best_of_meshes(plans, objective)[: top + 2]
    priced = sorted((_simulate(question, plan) for plan in best), key=lambda plan: _rank(plan, objective))
    return explain_plans(priced[:top], objective=objective)


def price_layout(question: TrainQuestion, layout: Layout, *, how: str = "simulate") -> Plan:
    """Return the plan of one layout, whether or not it fits.

    Args:
        how: "simulate" runs the schedule, "screen" takes the closed form.
    """
    return _price(question, layout, how=how, layer=None, memory=layout_memory(question, layout))


def layout_memory(question: TrainQuestion, layout: Layout) -> MemoryUse:
    """Return what the fullest device of a layout needs."""
    return fullest(
        step_memory(question.model, layout=layout, num_tokens=question.num_tokens, program=question.program)
    )


def smallest_fitting(question: TrainQuestion) -> int | None:
    """Return the least number of devices, by whole nodes, on which some layout fits; None up to 65,536."""
    node = question.topology.devices_per_node
    count = 1
    while count <= 1 << 16:
        topology = replace(question.topology, num_devices=count, devices_per_node=min(node, count))
        wider = replace(question, topology=topology)
        if _least(wider, counts=(count,)) is not None:
            return count
        count *= 2
    return None


def _price(
    question: TrainQuestion, layout: Layout, *, how: str, layer: LayerTime | None, memory: MemoryUse
) -> Plan:
    step = step_time(
        question.model,
        layout=layout,
        topology=question.topology,
        num_tokens=question.num_tokens,
        program=question.program,
        pipeline=pipeline_time_s if how == "simulate" else screen_pipeline_s,
        layer=layer,
    )
    return Plan(
        layout=layout,
        memory=memory,
        traffic_bytes={},
        costs=step_costs(step),
        step=step,
        mfu=step.mfu,
        bubble_fraction=step.bubble_fraction,
    )


def _fitting(question: TrainQuestion) -> Iterable[Layout]:
    for layout in _candidates(question, _device_counts(question)):
        if layout_memory(question, layout).total <= question.memory_limit:
            yield layout


def _candidates(question: TrainQuestion, counts: Iterable[int]) -> Iterable[Layout]:
    for count in counts:
        yield from legal_layouts(
            question.model, num_devices=count, batch_size=question.batch_size, remats=question.remats
        )


def _device_counts(question: TrainQuestion) -> tuple[int, ...]:
    topology = question.topology
    return tuple(sorted({topology.num_devices, topology.devices_per_node, 1}))


def _best_of_meshes(plans: Iterable[Plan], objective: str) -> list[Plan]:
    best: dict[str, Plan] = {}
    for plan in plans:
        name = str(plan.layout.mesh)
        if name not in best or _rank(plan, objective) < _rank(best[name], objective):
            best[name] = plan
    return sorted(best.values(), key=lambda plan: _rank(plan, objective))


def _rank(plan: Plan, objective: str) -> tuple[float, ...]:
    """What is to be small; of equals the fewest devices."""
    first = plan.memory.total if objective == "memory" else -plan.tokens_per_s
    return (first, plan.time_s, plan.layout.num_devices)


def _simulate(question: TrainQuestion, plan: Plan) -> Plan:
    layout = plan.layout
    actions = 6 * layout.pipe**2 * layout.chunks
    how = "simulate" if actions <= _SIMULATED_ACTIONS else "screen"
    priced = _price(question, layout, how=how, layer=None, memory=plan.memory)
    traffic = step_traffic(question.model, layout=layout, num_tokens=question.num_tokens)
    return replace(priced, traffic_bytes=traffic)


def _least(question: TrainQuestion, *, counts: Sequence[int]) -> Plan | None:
    """The layout of least memory if it fits."""
    fitting = (
        layout
        for layout in _candidates(question, counts)
        if layout_memory(question, layout).total <= question.memory_limit
    )
    layout = next(iter(fitting), None)
    return None if layout is None else price_layout(question, layout, how="screen")


def _nothing_fits(question: TrainQuestion) -> PlanError:
    topology, limit = question.topology, question.memory_limit
    asked = f"{question.model.num_layers} layers of width {question.model.hidden_size} on {topology.name}"
    layouts = list(_candidates(question, _device_counts(question)))
    if not layouts:
        meshes = list(legal_meshes(question.model, num_devices=topology.num_devices))
        datas = sorted({mesh.data for mesh in meshes})
        why = f"train.batch_size={question.batch_size} splits over none of data={', '.join(map(str, datas))}"
        return PlanError(
            f"no layout of {asked}: {why if meshes else 'heads, features and vocabulary split over no mesh'}.",
            fix=f"set train.batch_size to a multiple of {datas[0]}." if meshes else "pad model.vocab_size.",
        )
    needs = min(layout_memory(question, layout).total for layout in layouts)
    count = smallest_fitting(question)
    fixes = [f"use {count} or more devices"] if count else []
    fixes.append("a smaller model or shorter sequences")
    return PlanError(
        f"nothing fits: {asked} needs at least {needs / _GB:.1f} GB a device, and {limit / _GB:.1f} GB of "
        f"{topology.accelerator.memory_bytes / _GB:.1f} may be used.",
        fix=f"{', '.join(fixes)}.",
    )
