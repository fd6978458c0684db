"""Bound the time of a step from below without building its schedule, so that a search can leave out what cannot win.

No schedule is faster than the rank that waits most and works most. With `r` stages before a rank's first one, where F,
I and W are a stage's forward, input gradient and weight gradient, and B = I + W:

    rank r   | r x F, then its own work of m microbatches, then r x B     whole backwards: I and W are one action
             | r x F, then its own work of m microbatches                 split ones: W may run while others end

All that a step does besides is priced as `step_time.py` prices it, which gives no less for a longer pipeline. So the
bound of a layout is at most its price, and equal to it without a pipeline.
"""

from functools import lru_cache
from itertools import accumulate
from typing import Any

from ...layers import ModelConfig
from ...schedules import Placement
from ..machines.topology import Topology
from .device_params import ends_of
from .layer_time import LayerTime, layer_time
from .layout import Layout
from .runtime import Runtime
from .stage_time import EndCosts, end_costs, stage_layers
from .step_time import exposed_data_s
from .update_time import UpdateTime, update_time

_ROUNDING = 1 - 1e-9
"""A price is a sum of many floats, so equal times may differ in the last digits."""


class StepBounds:
    """Lower bounds of the time of many layouts of one model on one machine, which share the times of their parts."""

    def __init__(self, model: ModelConfig, *, topology: Topology, num_tokens: int, runtime: Runtime) -> None:
        self.model, self.topology, self.num_tokens, self.runtime = model, topology, num_tokens, runtime
        self._layers: dict[tuple[object, ...], LayerTime] = {}
        self._ends: dict[tuple[object, ...], EndCosts] = {}
        self._pipelines: dict[tuple[object, ...], float] = {}
        self._updates: dict[tuple[object, ...], UpdateTime] = {}

    def layer_time(self, layout: Layout) -> LayerTime:
        """Return the time of a layer, which layouts that differ in schedule, data or shard alone have in common."""
        key = (layout.tensor, layout.context, layout.context_attention, layout.expert, layout.sequences, layout.remat)
        if key not in self._layers:
            self._layers[key] = layer_time(self.model, layout=layout, topology=self.topology, **self._given)
        return self._layers[key]

    def time_s(self, layout: Layout) -> float:
        """Return seconds that a step of a layout with a schedule of fixed order takes at least."""
        layer = self.layer_time(layout)
        pipeline_s = self._pipeline_s(layout, layer)
        placement = _place(layout)
        of_rank = sum(stage_layers(self.model, layout)[stage] for stage in placement.stages_of(0))
        data = self._update_time(layout, num_layers=of_rank, ends=ends_of(placement, 0))
        hidden = {"layers": self.model.num_layers, "pipeline_s": pipeline_s, "backward": of_rank * layer.backward}
        data_s = exposed_data_s(data, layout=layout, runtime=self.runtime, **hidden)
        return _ROUNDING * (pipeline_s + data_s + data.optimizer)

    def _pipeline_s(self, layout: Layout, layer: LayerTime) -> float:
        """Return the least seconds from the first forward to the last gradient."""
        mesh = (layout.data, layout.tensor, layout.pipe, layout.context, layout.fsdp, layout.expert)
        own = (
            layout.context_attention,
            layout.sequences,
            layout.remat,
            layout.chunks,
            layout.family.placement,
            layout.is_backward_split,
        )
        key = (*mesh, *own, layout.microbatches)
        if key not in self._pipelines:
            ends = self._end_costs(layout)
            self._pipelines[key] = max(self._rank_s(layout, rank, layer, ends) for rank in {0, layout.pipe - 1})
        return self._pipelines[key]

    def _rank_s(self, layout: Layout, rank: int, layer: LayerTime, ends: EndCosts) -> float:
        """Return the seconds that a rank works, and waits for its first forward and for what follows its last."""
        layers = stage_layers(self.model, layout)
        before = _sums(layers)[rank]
        mine = _place(layout).stages_of(rank)
        of_rank = sum(layers[stage] for stage in mine)
        work = of_rank * (layer.forward + layer.backward)
        work += ends.embedding.total if 0 in mine else 0.0
        work += ends.head.total if len(layers) - 1 in mine else 0.0
        ramp = before * layer.forward + (ends.embedding.forward if rank else 0.0)
        hops = 0.0 if self.runtime.blocking_hops == "on" else rank * ends.hop
        if not layout.is_backward_split:
            ramp += before * layer.backward + (ends.embedding.total - ends.embedding.forward if rank else 0.0)
            hops *= 2
        return ramp + hops + layout.microbatches * (work + ends.shared_loss)

    def _end_costs(self, layout: Layout) -> EndCosts:
        key = (layout.tensor, layout.pipe, layout.context, layout.replicas, layout.sequences)
        if key not in self._ends:
            self._ends[key] = end_costs(self.model, layout=layout, topology=self.topology, **self._given)
        return self._ends[key]

    def _update_time(self, layout: Layout, *, num_layers: int, ends: Any) -> UpdateTime:
        mesh = (layout.data, layout.tensor, layout.pipe, layout.context, layout.fsdp, layout.expert)
        rounds = layout.microbatches if layout.zero == 3 or layout.fsdp > 1 else 1
        key = (*mesh, layout.zero, layout.offload, rounds, num_layers, ends)
        if key not in self._updates:
            sizes = {"layout": layout, "topology": self.topology, "num_layers": num_layers, "ends": ends}
            self._updates[key] = update_time(self.model, runtime=self.runtime, **sizes)
        return self._updates[key]

    @property
    def _given(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "num_tokens": self.num_tokens}


def _place(layout: Layout) -> Placement:
    return _placement(layout.family.placement, layout.pipe, layout.chunks)


@lru_cache(maxsize=1024)
def _placement(shape: Any, num_ranks: int, num_chunks: int) -> Placement:
    return Placement.of(shape, num_ranks=num_ranks, num_chunks=num_chunks)


@lru_cache(maxsize=1024)
def _sums(layers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of layers before each stage."""
    return tuple(accumulate(layers, initial=0))
