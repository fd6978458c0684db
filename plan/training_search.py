"""Search for a training layout: price all legal ones under the memory limit, fastest first.

Every layout's schedule is simulated, so that a layout has the same price wherever it is shown. Read `plan.py` for the
result, `serving_search.py` for inference.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from ..layers import ModelConfig
from ..meshes.arguments import check_choice, check_count, check_fields
from ..meshes.errors import PlanError
from ..meshes.spec import Offload
from ..programs.hardware import XLA_MEMORY_SHARE
from .costs.layout import Layout, PlanRemat
from .costs.memory_model import MemoryUse, fullest, step_memory
from .costs.runtime import Runtime, trellax_runtime
from .costs.step_time import LayerTimes, layer_times, step_time
from .explanations import explain_plans
from .legal_layouts import device_counts, legal_layouts, legal_meshes
from .machines.topology import Topology
from .plan import Plan, step_costs, step_traffic

MEMORY_RESERVE = 0.06
"""Share of a device's memory reserved for the driver, collectives and gaps between buffers."""

_TOP = 5
_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class TrainQuestion:
    """A model to train on a machine, with `batch_size` sequences of `num_tokens` tokens per step.

    Args:
        runtime: traits of the training runtime to price; if left out, those of trellax's own step for this model on
            this accelerator, with the vocabulary split over the pipeline (`trellax_runtime`).
        remats: rematerialization policies to try.
        context: devices that share each sequence, the same in all layouts that are tried.

    Raises:
        PlanError: a size is below 1, or a policy is unknown.
    """

    model: ModelConfig
    topology: Topology
    batch_size: int
    num_tokens: int
    runtime: Runtime | None = None
    remats: tuple[PlanRemat, ...] = ("none", "dots", "full")
    context: int = 1

    def __post_init__(self) -> None:
        check_fields(self, error=PlanError)
        for remat in self.remats:
            check_choice("remats", remat, get_args(PlanRemat), error=PlanError)

    @cached_property
    def priced_runtime(self) -> Runtime:
        """The runtime that is priced: `runtime`, or trellax's own if that is None."""
        return self.runtime or trellax_runtime(self.model, self.topology.accelerator)

    @property
    def memory_limit(self) -> float:
        """Bytes of each device that XLA plans for; steps that need more are slower than predicted."""
        return XLA_MEMORY_SHARE * self.topology.accelerator.memory_bytes

    @property
    def device_limit(self) -> float:
        """Bytes of each device that a step can use."""
        return (1 - MEMORY_RESERVE) * self.topology.accelerator.memory_bytes


def search_train(question: TrainQuestion, *, objective: str = "train", top: int = _TOP) -> list[Plan]:
    """Return the best plans, one per mesh, best first, each with the reason for its rank.

    Meshes of all devices, of a power of two of them, of one node and of one device are tried, so the result may use
    fewer devices than there are.

    >>> search_train(TrainQuestion(model=config, topology=read_topology("h100x8"), batch_size=64, num_tokens=2048))[0]

    Args:
        objective: "train" for the most tokens per second, "memory" for the least memory of the fullest device.
        top: number of plans.

    Raises:
        PlanError: nothing fits (the message says what would), or the objective is unknown.
    """
    check_choice("objective", objective, ("train", "memory"), error=PlanError)
    check_count("top", top, error=PlanError)
    return rank_train(question, price_train(question), objective=objective, top=top)


def rank_train(question: TrainQuestion, plans: Iterable[Plan], *, objective: str, top: int = _TOP) -> list[Plan]:
    """Return the best of the plans of `price_train` as `search_train` does."""
    best = _best_of_meshes(plans, objective)[:top]
    return explain_plans([_with_traffic(question, plan) for plan in best], objective=objective)


def price_train(question: TrainQuestion) -> list[Plan]:
    """Return the plan of every layout that fits, unsorted and without its traffic.

    If none keeps within the memory that XLA plans for, all that fit the device are returned; `diagnose` warns of it. If
    none fits, moments are kept on the host.

    Raises:
        PlanError: nothing fits; the message says what would.
    """
    layers: dict[tuple[object, ...], LayerTimes] = {}
    fitting = list(_fitting(question)) or list(_fitting(question, offload="optimizer"))
    plans = []
    # Memory is computed first, since it is cheap; only layouts that fit are timed.
    for layout, memory in [pair for pair in fitting if pair[1].total <= question.memory_limit] or fitting:
        # Layouts with the same parts of a layer, microbatch and rematerialization share the time of a layer.
        key = (layout.tensor, layout.sequences, layout.remat, layout.context, layout.expert)
        if key not in layers:
            layers[key] = layer_times(
                question.model,
                layout=layout,
                runtime=question.priced_runtime,
                topology=question.topology,
                num_tokens=question.num_tokens,
            )
        plans.append(_price(question, layout, layer=layers[key], memory=memory))
    if not plans:
        raise _nothing_fits(question)
    return plans


def price_layout(question: TrainQuestion, layout: Layout) -> Plan:
    """Return the plan of one layout, whether or not it fits."""
    plan = _price(question, layout, layer=None, memory=layout_memory(question, layout))
    return _with_traffic(question, plan)


def layout_memory(question: TrainQuestion, layout: Layout) -> MemoryUse:
    """Return the memory of the fullest device of a layout."""
    return fullest(
        step_memory(question.model, layout=layout, num_tokens=question.num_tokens, runtime=question.priced_runtime)
    )


def smallest_fitting(question: TrainQuestion) -> int | None:
    """Return the least number of devices, in whole nodes, on which some layout fits; None if it is above 65,536."""
    node = question.topology.devices_per_node
    # The search has tried all that there are, and fewer.
    count = 2 * question.topology.num_devices
    while count <= 1 << 16:
        topology = replace(question.topology, num_devices=count, devices_per_node=min(node, count))
        wider = replace(question, topology=topology)
        layouts = _candidates(wider, (count,), offload="optimizer")
        if any(layout_memory(wider, layout).total <= wider.device_limit for layout in layouts):
            return count
        count *= 2
    return None


def _price(question: TrainQuestion, layout: Layout, *, layer: LayerTimes | None, memory: MemoryUse) -> Plan:
    step = step_time(
        question.model,
        layout=layout,
        topology=question.topology,
        num_tokens=question.num_tokens,
        runtime=question.priced_runtime,
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


def _with_traffic(question: TrainQuestion, plan: Plan) -> Plan:
    runtime = question.priced_runtime
    traffic = step_traffic(question.model, layout=plan.layout, num_tokens=question.num_tokens, runtime=runtime)
    return replace(plan, traffic_bytes=traffic)


def _fitting(question: TrainQuestion, *, offload: Offload = "none") -> Iterable[tuple[Layout, MemoryUse]]:
    for layout in _candidates(question, device_counts(question.topology), offload=offload):
        memory = layout_memory(question, layout)
        if memory.total <= question.device_limit:
            yield layout, memory


def _candidates(question: TrainQuestion, counts: Iterable[int], *, offload: Offload) -> Iterable[Layout]:
    for count in counts:
        layouts = legal_layouts(
            question.model,
            num_devices=count,
            batch_size=question.batch_size,
            remats=question.remats,
            vocab=question.priced_runtime.vocab,
            context=question.context,
        )
        yield from (replace(layout, offload=offload) for layout in layouts)


def _best_of_meshes(plans: Iterable[Plan], objective: str) -> list[Plan]:
    """Return the best plan of every mesh, best first."""
    best: dict[str, Plan] = {}
    for plan in plans:
        name = str(plan.layout.mesh)
        if name not in best or _rank(plan, objective) < _rank(best[name], objective):
            best[name] = plan
    return sorted(best.values(), key=lambda plan: _rank(plan, objective))


def _rank(plan: Plan, objective: str) -> tuple[float, ...]:
    """Return the sort key: the objective, then time, then number of devices."""
    first = plan.memory.total if objective == "memory" else -plan.tokens_per_s
    return (first, plan.time_s, plan.layout.num_devices)


def _nothing_fits(question: TrainQuestion) -> PlanError:
    topology, limit = question.topology, question.device_limit
    asked = f"{question.model.num_layers} layers of width {question.model.hidden_size} on {topology.name}"
    layouts = list(_candidates(question, (topology.num_devices,), offload="optimizer"))
    if not layouts:
        vocab = question.priced_runtime.vocab
        meshes = list(
            legal_meshes(question.model, num_devices=topology.num_devices, vocab=vocab, context=question.context)
        )
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
        f"nothing fits: {asked} needs at least {needs / _GB:.1f} GB a device, the optimizer's moments on the host, and "
        f"{limit / _GB:.1f} GB of {topology.accelerator.memory_bytes / _GB:.1f} may be used.",
        fix=f"{', '.join(fixes)}.",
    )
