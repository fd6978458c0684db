"""Bound the memory of a step from below, so that a search computes it only where it matters.

The fullest rank has at least the weights, gradients and optimizer state of the mean rank, and the residuals of one
chunk of layers for the microbatches in flight. Temporary buffers are left out. Read `step_bound.py` for the time.
"""

from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from ...layers.experts.kinds import layer_kinds
from .layout import Layout
from .memory_model import kept_bytes, peak_in_flight, step_memory
from .runtime import Runtime

_ROUNDING = 1 - 1e-9


class MemoryBounds:
    """Lower bounds of the memory of many layouts of one model, whose schedules have a fixed order."""

    def __init__(self, model: ModelConfig, *, num_tokens: int, runtime: Runtime) -> None:
        self.model, self.runtime, self.num_tokens = model, runtime, num_tokens
        self._states: dict[tuple[object, ...], float] = {}
        self._kept: dict[tuple[object, ...], float] = {}

    def total(self, layout: Layout) -> float:
        """Return bytes that the fullest device of a layout needs at least."""
        residuals = self._layer_bytes(layout) / layout.num_stages * self._held(layout)
        return _ROUNDING * (self._state(layout) + residuals)

    def _state(self, layout: Layout) -> float:
        """Return the bytes of weights, gradients and optimizer state of the rank that has least of them."""
        mesh = (
            layout.data,
            layout.tensor,
            layout.pipe,
            layout.context,
            layout.fsdp,
            layout.expert,
            layout.context_expert,
        )
        # Room for layers of two kinds depends on the number of stages; else more stages leave the mean as it is.
        chunks = layout.chunks if self.model.dense_layers else 1
        key = (*mesh, layout.zero, layout.offload, chunks)
        if key not in self._states:
            alike = replace(
                layout,
                schedule="interleaved-1f1b" if chunks > 1 else "1f1b",
                chunks=chunks,
                microbatches=layout.pipe,
                sequences=1,
                gathers="layer",
                layers_per_stage=None,
            )
            ranks = step_memory(self.model, layout=alike, **self._given)
            self._states[key] = min(rank.weights + rank.gradients + rank.optimizer for rank in ranks)
        return self._states[key]

    def _layer_bytes(self, layout: Layout) -> float:
        """Return the bytes of residuals of all layers, of one microbatch."""
        key = (layout.sequences, layout.tensor, layout.context, layout.remat, layout.is_backward_split)
        if key not in self._kept:
            kinds = tuple((kind.config, kind.num_layers) for kind in layer_kinds(self.model))
            self._kept[key] = kept_bytes(kinds, layout=layout, **self._given)
        return self._kept[key]

    def _held(self, layout: Layout) -> int:
        """Return the microbatches of a chunk in flight by the family's formula, or 1 if only the schedule tells."""
        if layout.pipe == 1 or (layout.family.peak_in_flight is None or self.runtime.clock != "lockstep"):
            return 1
        sizes = {"num_ranks": layout.pipe, "num_microbatches": layout.microbatches, "num_chunks": layout.chunks}
        return max(peak_in_flight(layout.schedule, **sizes, traits=self.runtime.order_traits))

    @property
    def _given(self) -> dict[str, Any]:
        return {"runtime": self.runtime, "num_tokens": self.num_tokens}
