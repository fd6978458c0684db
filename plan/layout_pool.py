"""Search a pool of layouts for the best, pricing only those that a lower bound does not rule out.

Layouts are taken in the order of their bounds. Once a bound is above the price of what is already found, all that
follow cost more, so the result is that of pricing every layout:

    bound    1.0   1.1   1.3   1.6   1.9 ...
    price    1.2   1.5   1.4    -     -        1.6 > 1.5: with two wanted the search ends after three

Schedules are simulated for what is priced alone. `../tests/plan/test_layout_pool.py` compares with pricing everything.
Read `training_search.py` next.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from ..layers import ModelConfig
from .costs.layout import Layout
from .costs.memory_bound import MemoryBounds
from .costs.memory_model import MemoryUse, fullest, step_memory
from .costs.runtime import Runtime
from .costs.step_bound import StepBounds
from .costs.step_time import step_time
from .machines.topology import Topology
from .plan import Plan, step_costs

Cost = Callable[[float, float, Layout], float]
"""A cost of a layout, given seconds of a step, bytes of the fullest device, and the layout; it grows with both."""


class LayoutPool:
    """Layouts of one question, with memory and prices that are computed when they are first asked for."""

    def __init__(
        self, model: ModelConfig, *, layouts: Sequence[Layout], topology: Topology, num_tokens: int, runtime: Runtime
    ) -> None:
        self.model, self.layouts, self.topology = model, layouts, topology
        self.num_tokens, self.runtime = num_tokens, runtime
        self._memory: dict[int, MemoryUse] = {}
        self._plans: dict[int, Plan] = {}

    @cached_property
    def _steps(self) -> StepBounds:
        return StepBounds(self.model, topology=self.topology, num_tokens=self.num_tokens, runtime=self.runtime)

    @cached_property
    def _times(self) -> list[float]:
        return [self._steps.time_s(layout) for layout in self.layouts]

    @cached_property
    def _sizes(self) -> list[float]:
        bounds = MemoryBounds(self.model, num_tokens=self.num_tokens, runtime=self.runtime)
        return [bounds.total(layout) for layout in self.layouts]

    @cached_property
    def _by_size(self) -> list[int]:
        return sorted(range(len(self.layouts)), key=self._sizes.__getitem__)

    def memory(self, place: int) -> MemoryUse:
        """Return the memory of the fullest device of the layout at a place."""
        if place not in self._memory:
            sizes = {"num_tokens": self.num_tokens, "runtime": self.runtime}
            self._memory[place] = fullest(step_memory(self.model, layout=self.layouts[place], **sizes))
        return self._memory[place]

    def plan(self, place: int) -> Plan:
        """Return the price of the layout at a place, from its simulated schedule."""
        if place not in self._plans:
            layout = self.layouts[place]
            sizes = {"layout": layout, "topology": self.topology, "num_tokens": self.num_tokens}
            step = step_time(self.model, **sizes, runtime=self.runtime, layer=self._steps.layer_times(layout))
            self._plans[place] = Plan(
                layout=layout,
                memory=self.memory(place),
                traffic_bytes={},
                costs=step_costs(step),
                step=step,
                mfu=step.mfu,
                bubble_fraction=step.bubble_fraction,
                device_watts=self.topology.accelerator.watts,
            )
        return self._plans[place]

    def least_memory(self) -> float:
        """Return the least memory that any layout needs, or infinity if there is none."""
        least = float("inf")
        for place in self._by_size:
            if self._sizes[place] > least:
                break
            least = min(least, self.memory(place).total)
        return least

    def has_room(self, limit: float) -> bool:
        """Return whether any layout needs no more memory than a limit."""
        places = (place for place in self._by_size if self._sizes[place] <= limit)
        return any(self.memory(place).total <= limit for place in places)

    def best_of_meshes(self, *, cost: Cost, limit: float, top: int) -> list[Plan]:
        """Return the best plan of each of the best meshes within a limit of memory, best first.

        Of equal costs the faster, then that with less memory, is the better one.
        """
        best: dict[tuple[int, ...], tuple[tuple[float, ...], Plan]] = {}
        worst = float("inf")
        for bound, place in self._ordered(cost):
            if bound > worst:
                break
            mesh = _mesh_of(self.layouts[place])
            if mesh in best and bound > best[mesh][0][0]:
                continue
            if self._sizes[place] > limit or self.memory(place).total > limit:
                continue
            size = self.memory(place).total
            # Its memory is known by now, so the bound is tighter.
            tight = cost(self._times[place], size, self.layouts[place])
            if tight > worst or (mesh in best and (tight, self._times[place]) > best[mesh][0][:2]):
                continue
            plan = self.plan(place)
            rank = (cost(plan.time_s, size, plan.layout), plan.time_s, size, float(plan.layout.num_devices))
            if mesh not in best or rank < best[mesh][0]:
                best[mesh] = (rank, plan)
                worst = sorted(one[0] for one, _ in best.values())[top - 1] if len(best) >= top else worst
        return [plan for _, plan in sorted(best.values(), key=lambda pair: pair[0])][:top]

    def front(self, *, costs: Sequence[Cost], limit: float) -> list[Plan]:
        """Return the plans within a limit of memory that no other beats or equals in all costs, best first."""
        found: list[tuple[tuple[float, ...], Plan]] = []
        for _, place in self._ordered(costs[0]):
            layout, time_s = self.layouts[place], self._times[place]
            if self._sizes[place] > limit or _is_beaten(
                [cost(time_s, self._sizes[place], layout) for cost in costs], found
            ):
                continue
            size = self.memory(place).total
            if size > limit or _is_beaten([cost(time_s, size, layout) for cost in costs], found):
                continue
            plan = self.plan(place)
            point = tuple(cost(plan.time_s, size, layout) for cost in costs)
            if not _is_beaten(point, found):
                found = [one for one in found if not _beats(point, one[0])] + [(point, plan)]
        return [plan for _, plan in sorted(found, key=lambda pair: pair[0])]

    @property
    def priced(self) -> list[Plan]:
        """The plans of all layouts that have been priced so far."""
        return list(self._plans.values())

    def _ordered(self, cost: Cost) -> Iterator[tuple[float, int]]:
        """Yield the lower bound of every layout's cost, least first, and the layout's place."""
        bounds = map(cost, self._times, self._sizes, self.layouts)
        return iter(sorted(zip(bounds, range(len(self.layouts)), strict=True)))


def _is_beaten(point: Sequence[float], found: Sequence[tuple[tuple[float, ...], Plan]]) -> bool:
    return any(_beats(other, point) for other, _ in found)


def _beats(point: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether a point is as good as another or better in all costs."""
    return all(own <= its for own, its in zip(point, other, strict=True))


def _mesh_of(layout: Layout) -> tuple[int, ...]:
    experts = (layout.expert, layout.context_expert)
    return (layout.data, layout.fsdp, *experts, layout.context, layout.tensor, layout.pipe)
