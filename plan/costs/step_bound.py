"""Bound the time of a step from below without building its schedule, so that a search can leave out what cannot win.

No schedule is faster than the rank that waits most and works most. With `r` stages before a rank's first one, where F,
I and W are a stage's forward, input gradient and weight gradient, and B = I + W:

    rank r   | r x F, then its own work of m microbatches, then r x B     whole backwards: I and W are one action
             | r x F, then its own work of m microbatches                 split ones: W may run while others end

All that a step does besides is priced as `step_time.py` prices it, which gives no less for a longer pipeline. So the
bound of a layout is at most its price, and equal to it without a pipeline.
"""

from functools import lru_cache
from typing import Any

from ...layers import ModelConfig
from ...schedules import Placement
from ..machines.topology import Topology
from .device_params import ends_of
from .held_layers import KindCounts, held_layers, kinds_of_stages
from .layer_time import LayerTime, sum_times
from .layout import Layout
from .runtime import Runtime
from .stage_time import EndCosts, end_costs, stage_layers
from .step_time import LayerTimes, data_time_s, layer_times
from .update_time import UpdateTime, update_time

_ROUNDING = 1 - 1e-9
"""A price is a sum of many floats, so equal times may differ in the last digits."""


class StepBounds:
    """Lower bounds of the time of many layouts of one model on one machine, which share the times of their parts."""

    def __init__(self, model: ModelConfig, *, topology: Topology, num_tokens: int, runtime: Runtime) -> None:
        self.model, self.topology, self.num_tokens, self.runtime = model, topology, num_tokens, runtime
        self._layers: dict[tuple[object, ...], LayerTimes] = {}
        self._stages: dict[tuple[object, ...], tuple[LayerTime, ...]] = {}
        self._kinds: dict[int, tuple[KindCounts, ...]] = {}
        self._held: dict[tuple[object, ...], KindCounts] = {}
        self._ends: dict[tuple[object, ...], EndCosts] = {}
        self._pipelines: dict[tuple[object, ...], float] = {}
        self._updates: dict[tuple[object, ...], UpdateTime] = {}

    def layer_times(self, layout: Layout) -> LayerTimes:
        """Return the times of layers, which layouts that differ in schedule, data or shard alone have in common."""
        key = _key_of_layer(layout)
        if key not in self._layers:
            self._layers[key] = layer_times(self.model, layout=layout, topology=self.topology, **self._given)
        return self._layers[key]

    def time_s(self, layout: Layout) -> float:
        """Return seconds that a step of a layout with a schedule of fixed order takes at least."""
        pipeline_s = self._pipeline_s(layout)
        stages, placement = self._stage_times(layout), _place(layout)
        data = self._update_time(layout, ends=ends_of(placement, 0))
        data_s = data_time_s(
            data,
            layout=layout,
            runtime=self.runtime,
            topology=self.topology,
            layers=self.model.num_layers,
            pipeline_s=pipeline_s,
            backward=sum(stages[stage].backward for stage in placement.stages_of(0)),
        )
        return _ROUNDING * (pipeline_s + data_s + data.optimizer)

    def _stage_times(self, layout: Layout) -> tuple[LayerTime, ...]:
        """Return the time of the layers of every stage."""
        key = (*_key_of_layer(layout), layout.num_stages)
        if key not in self._stages:
            times, kinds = self.layer_times(layout), self._kinds_of(layout)
            sums = {own: sum_times((times[kind], count) for kind, count in own) for own in set(kinds)}
            self._stages[key] = tuple(sums[own] for own in kinds)
        return self._stages[key]

    def _kinds_of(self, layout: Layout) -> tuple[KindCounts, ...]:
        """Return the layers of every stage by kind."""
        if layout.num_stages not in self._kinds:
            self._kinds[layout.num_stages] = kinds_of_stages(
                self.model, stage_layers(self.model, layout, runtime=self.runtime)
            )
        return self._kinds[layout.num_stages]

    def _pipeline_s(self, layout: Layout) -> float:
        """Return the least seconds from the first forward to the last gradient."""
        mesh = (layout.data, layout.fsdp, layout.pipe)
        own = (layout.chunks, layout.family.placement, layout.is_backward_split, layout.microbatches)
        key = (*_key_of_layer(layout), *mesh, *own)
        if key not in self._pipelines:
            ends = self._end_costs(layout)
            self._pipelines[key] = max(self._rank_s(layout, rank, ends) for rank in {0, layout.pipe - 1})
        return self._pipelines[key]

    def _rank_s(self, layout: Layout, rank: int, ends: EndCosts) -> float:
        """Return the seconds that a rank works, and waits for its first forward and for what follows its last."""
        stages = self._stage_times(layout)
        mine, before = _place(layout).stages_of(rank), stages[:rank]
        work = sum(stages[stage].forward + stages[stage].backward for stage in mine)
        work += ends.embedding.total if 0 in mine else 0.0
        work += ends.head.total if len(stages) - 1 in mine else 0.0
        ramp = sum(stage.forward for stage in before) + (ends.embedding.forward if rank else 0.0)
        hops = 0.0 if self.runtime.blocking_hops == "on" else rank * ends.hop
        if not layout.is_backward_split:
            ramp += sum(stage.backward for stage in before)
            ramp += ends.embedding.total - ends.embedding.forward if rank else 0.0
            hops *= 2
        return ramp + hops + layout.microbatches * (work + ends.shared_loss)

    def _end_costs(self, layout: Layout) -> EndCosts:
        key = (layout.tensor, layout.pipe, layout.context, layout.replicas, layout.sequences)
        if key not in self._ends:
            self._ends[key] = end_costs(self.model, layout=layout, topology=self.topology, **self._given)
        return self._ends[key]

    def _update_time(self, layout: Layout, *, ends: Any) -> UpdateTime:
        layers = self._layers_of_first(layout)
        mesh = (layout.data, layout.tensor, layout.pipe, layout.context, layout.fsdp, *_of_experts(layout))
        count = layout.microbatches if layout.splits_gradients else 1
        given: dict[str, Any] = {"layout": layout, "runtime": self.runtime}
        # How often chunks are gathered a schedule tells, which is not built here: at least once.
        rounds = 1 if layout.gathers == "chunk" else 2 * layout.microbatches
        key = (*mesh, layout.zero, layout.offload, count, rounds, ends, *(count for _, count in layers))
        if key not in self._updates:
            sizes = {"topology": self.topology, "layers": layers, "ends": ends, "rounds": rounds}
            self._updates[key] = update_time(self.model, **given, **sizes)
        return self._updates[key]

    def _layers_of_first(self, layout: Layout) -> KindCounts:
        """Return the layers that the first rank stores, by kind."""
        key = (layout.pipe, layout.chunks, layout.family.placement)
        if key not in self._held:
            layers, own = stage_layers(self.model, layout, runtime=self.runtime), _place(layout).stages_of(0)
            self._held[key] = held_layers(self.model, layers, stages=own).stored
        return self._held[key]

    @property
    def _given(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "num_tokens": self.num_tokens}


def _key_of_layer(layout: Layout) -> tuple[object, ...]:
    context = (layout.context, layout.context_attention)
    return (layout.tensor, *context, *_of_experts(layout), layout.sequences, layout.remat)


def _of_experts(layout: Layout) -> tuple[int, int]:
    return layout.expert, layout.context_expert


def _place(layout: Layout) -> Placement:
    return _placement(layout.family.placement, layout.pipe, layout.chunks)


@lru_cache(maxsize=1024)
def _placement(shape: Any, num_ranks: int, num_chunks: int) -> Placement:
    return Placement.of(shape, num_ranks=num_ranks, num_chunks=num_chunks)
