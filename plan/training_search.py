"""Search for a training layout: price all legal ones under the memory limit, fastest first.

A price is that of a simulated schedule, so that a layout has the same one wherever it is shown; `layout_pool.py` leaves
out only layouts that cannot win. Read `plan.py` for the result, `serving_search.py` for inference.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

from ..layers import ModelConfig
from ..meshes.arguments import check_choice, check_count, check_fields
from ..meshes.errors import PlanError
from ..meshes.spec import Offload
from ..programs.hardware import XLA_MEMORY_SHARE
from .costs.layout import Layout, PlanRemat
from .costs.memory_model import MemoryUse, fullest, step_memory
from .costs.runtime import Runtime, trellax_runtime
from .explanations import explain_front, explain_plans
from .layout_pool import LayoutPool
from .legal_layouts import device_counts, legal_contexts, legal_layouts, legal_meshes
from .machines.topology import Topology
from .objectives import find_cost
from .plan import Plan, step_traffic

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
        context: a number of devices that share each sequence, tried beside those of `legal_contexts`.
        counts: numbers of devices to try: a few, or all powers of two too, for objectives that fewer devices may serve.

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
    counts: Literal["few", "powers"] = "few"

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
        objective: "train" for the most tokens per second, "memory" for the least memory of the fullest device,
            "gpu-hours" for the least device time per token, "energy" for the least energy.
        top: number of plans.

    Raises:
        PlanError: nothing fits (the message says what would), or the objective is unknown.
    """
    return TrainSearch(question).best(objective=objective, top=top)


class TrainSearch:
    """A search whose layouts are priced once, for a ranking, for fronts of several objectives, and for pictures.

    Layouts keep within the memory that XLA plans for, if any of them does; if none does, within the device's, of which
    `diagnose` warns; if none fits that, moments are kept on the host.

    Raises:
        PlanError: nothing fits; the message says what would.
    """

    def __init__(self, question: TrainQuestion) -> None:
        self.question = question
        self._pool, self._limit = _find_pool(question)

    @property
    def priced(self) -> list[Plan]:
        """The plans of all layouts within the limit of memory that have been priced so far, without their traffic."""
        return [plan for plan in self._pool.priced if plan.memory.total <= self._limit]

    def best(self, *, objective: str, top: int = _TOP) -> list[Plan]:
        """Return the best plans as `search_train` does."""
        check_count("top", top, error=PlanError)
        cost = find_cost(objective, self.question.topology)
        best = self._pool.best_of_meshes(cost=cost, limit=self._limit, top=top)
        return explain_plans([_with_traffic(self.question, plan) for plan in best], objective=objective)

    def front(self, *objectives: str) -> list[Plan]:
        """Return the plans that no other beats in all objectives, by the first of them.

        Raises:
            PlanError: an objective is unknown, or one is energy and the machine has no watts.
        """
        costs = [find_cost(objective, self.question.topology) for objective in objectives]
        found = self._pool.front(costs=costs, limit=self._limit)
        return explain_front([_with_traffic(self.question, plan) for plan in found], objectives=objectives)


def _find_pool(question: TrainQuestion) -> tuple[LayoutPool, float]:
    """Return the first pool with a layout that fits, and the limit that it fits."""
    offloads: tuple[Offload, ...] = ("none", "optimizer")
    for offload in offloads:
        pool = _make_pool(question, device_counts(question.topology, counts=question.counts), offload=offload)
        for limit in (question.memory_limit, question.device_limit):
            if pool.has_room(limit):
                return pool, limit
    raise _nothing_fits(question)


def _make_pool(question: TrainQuestion, counts: Iterable[int], *, offload: Offload) -> LayoutPool:
    return LayoutPool(
        question.model,
        layouts=[layout for count in counts for layout in _layouts_of(question, count, offload=offload)],
        topology=question.topology,
        num_tokens=question.num_tokens,
        runtime=question.priced_runtime,
    )


def _layouts_of(question: TrainQuestion, num_devices: int, *, offload: Offload) -> Iterable[Layout]:
    contexts = {question.context, *legal_contexts(num_devices=num_devices, num_tokens=question.num_tokens)}
    return legal_layouts(
        question.model,
        num_devices=num_devices,
        batch_size=question.batch_size,
        remats=question.remats,
        contexts=tuple(sorted(contexts)),
        offload=offload,
    )


def price_layout(question: TrainQuestion, layout: Layout) -> Plan:
    """Return the plan of one layout, whether or not it fits."""
    sizes = {"topology": question.topology, "num_tokens": question.num_tokens, "runtime": question.priced_runtime}
    return _with_traffic(question, LayoutPool(question.model, layouts=[layout], **sizes).plan(0))


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
        if _make_pool(wider, (count,), offload="optimizer").has_room(wider.device_limit):
            return count
        count *= 2
    return None


def _with_traffic(question: TrainQuestion, plan: Plan) -> Plan:
    runtime = question.priced_runtime
    traffic = step_traffic(question.model, layout=plan.layout, num_tokens=question.num_tokens, runtime=runtime)
    return replace(plan, traffic_bytes=traffic)


def _nothing_fits(question: TrainQuestion) -> PlanError:
    topology, limit = question.topology, question.device_limit
    pool = _make_pool(question, (topology.num_devices,), offload="optimizer")
    asked = f"{question.model.num_layers} layers of width {question.model.hidden_size} on {topology.name}"
    if not pool.layouts:
        datas = sorted({mesh.data for mesh in legal_meshes(question.model, num_devices=topology.num_devices)})
        why = f"train.batch_size={question.batch_size} splits over none of data={', '.join(map(str, datas))}"
        return PlanError(f"no layout of {asked}: {why}.", fix=f"set train.batch_size to a multiple of {datas[0]}.")
    count = smallest_fitting(question)
    fixes = [f"use {count} or more devices"] if count else []
    fixes.append("a smaller model or shorter sequences")
    return PlanError(
        f"nothing fits: {asked} needs at least {pool.least_memory() / _GB:.1f} GB a device, the optimizer's moments on "
        f"the host, and {limit / _GB:.1f} GB of {topology.accelerator.memory_bytes / _GB:.1f} may be used.",
        fix=f"{', '.join(fixes)}.",
    )
