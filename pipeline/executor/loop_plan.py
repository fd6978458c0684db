"""Plan the executor's loop before it starts: residuals of a layer, halves of its backward, buffers of the right size.

    model   --types-->  vjp     forward and backward of a layer
    tables              halves  the backward in two, if the tables have such actions
                        kept    types of the residuals --> buffers [slots, layers, ...]

Read `loop_state.py` next.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ...layers.in_order import start_mark
from ...meshes.host_memory import to_host
from ...schedules import Placement
from ..lowering.tables import Tables, Turns
from .backward.residuals import LayerVjp
from .backward.split_backward import SplitBackward
from .buffers import empty_buffer, floats_of
from .enter import Enter
from .host_residuals import Packing
from .layers import LayerStack
from .leave import Leave
from .loop_state import LoopState, Wants
from .rank_model import RankModel

Bubbles = Literal["zeros", "nan"]
"""Content of buffers before use and of idle sends; "nan" proves that none of it reaches a result."""


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """Constants of the loop: all that a turn needs besides the state and its row of the tables.

    enter, leave: the ends of a stage.
    vjps: forward and backward of a layer of each kind; none where only the loss is wanted.
    halves: the backward in two, for tables with such actions.
    placement: which rank holds which stage.
    kept: by kind, types of the residuals of a layer and microbatch, with what the first half of a backward adds.
    """

    model: RankModel
    enter: Enter
    leave: Leave
    vjps: dict[str, LayerVjp]
    halves: dict[str, SplitBackward]
    kept: dict[str, list[jax.ShapeDtypeStruct]]
    placement: Placement
    wants: Wants
    bubbles: Bubbles

    def start_state(self, tables: Tables) -> LoopState:
        """Return the state before the first turn: unused buffers, sums of zero."""
        sums, x = self.model.zero_sums(), self.model.x
        # Every rank allocates as many slots as the rank that needs the most: all ranks run one program.
        activations = self.fill(x, tables.num_activation_slots)
        slots = tables.num_weight_slots
        weights = {kind: self.fill(own, slots) for kind, own in self.model.chunk_types.items()} if slots else {}
        if self.wants == "loss":
            return LoopState(sums=sums, activations=activations, weights=weights, mark=start_mark())
        return LoopState(
            sums=sums,
            activations=activations,
            weights=weights,
            gradients=self.fill(floats_of(x), tables.num_gradient_slots),
            residuals={
                kind: self.fill(own, tables.num_residual_slots, self.model.room(kind))
                for kind, own in self.kept.items()
            },
            host=self._start_host(tables),
            grads=self.model.zero_grads(),
            mark=start_mark(),
        )

    def _start_host(self, tables: Tables) -> dict[str, list[jax.Array]]:
        if not tables.num_host_slots:
            return {}
        # One more, for ranks with nothing to copy.
        slots = tables.num_host_slots + 1
        filled = {kind: self.fill(own.types, slots, self.model.room(kind)) for kind, own in self.packings.items()}
        return jax.tree.map(to_host, filled)

    @property
    def packings(self) -> dict[str, Packing]:
        """How residuals travel to the host, by kind."""
        return {kind: Packing(vjp.kept) for kind, vjp in self.vjps.items()}

    def stack(self, turn: Turns, state: LoopState) -> LayerStack:
        """Return the layers of the stage that a turn's action runs."""
        stack = self.model.stack(turn.compute.chunk, turn.compute.stage)
        return stack if turn.weights is None else stack.with_chunks(state.weights, turn.weights.read)

    def fill(self, types: Any, *slots: int) -> Any:
        """Return buffers [*slots, ...] as they are before use: zeros, or NaN to prove that none is read."""
        return jax.tree.map(lambda kind: empty_buffer(kind, *slots, fill=_filling(self.bubbles, kind.dtype)), types)


def plan_loop(model: RankModel, *, tables: Tables, bubbles: Bubbles, wants: Wants) -> LoopPlan:
    """Return the plan of one rank's loop; for use inside `shard_map`."""
    # Each kind of layer is traced once, whatever the number of layers, microbatches and turns.
    vjps = model.plan_backward() if wants == "grads" else {}
    halves = model.split_backward(vjps) if tables.has_halves else {}
    kept = {kind: [*vjp.kept, *(halves[kind].extra if halves else ())] for kind, vjp in vjps.items()}
    return LoopPlan(
        model=model,
        enter=Enter(model=model),
        leave=Leave(model=model, wants=wants),
        vjps=vjps,
        halves=halves,
        kept=kept,
        placement=tables.placement,
        wants=wants,
        bubbles=bubbles,
    )


def _filling(bubbles: Bubbles, dtype: Any) -> float:
    return jnp.nan if bubbles == "nan" and jnp.issubdtype(dtype, jnp.floating) else 0
