"""Typed tables of integers that tell the executor what every rank does in every turn.

A tick, the time step of a schedule, becomes one or more turns. In a turn every rank runs at most one action, and in the
last turn of a tick neighbours exchange what they made. 1F1B with 2 ranks and 2 microbatches, one dense layer
y = tanh(x @ w) a rank, where rank 1 runs a forward and a backward in ticks 1 and 2:

    tick                   0       1               2               3
    turn                   0       1       2       3       4       5
    rank 0   kind          F0      F1      .       B0      .       B1
             residuals     0       1       .       0       .       1         slots from forward to backward
    rank 1   kind          .       F0      B0      F1      B1      .
             residuals     .       0       0       0       0       .
    forward[1].is_active   1       .       1       .       .       .         y: rank 0 -> rank 1
    backward[-1].is_active .       .       1       .       1       .         dx: rank 0 <- rank 1

Inside a turn the steps have a fixed order. Right of each step are the columns that decide it:

    turn t  +-------------------------------------------------------------+
            | 1 first       all ranks make x of one microbatch            | ends.first, activations.first
            | 2 action      weights of its chunk -> their slot            | weights.gather, .read
            |               every rank runs its own:                      | compute.kind, .microbatch, .chunk
            |     forward      x <- activations; residuals -> their slot  | activations.read, compute.residuals
            |                  y -> activations, or the loss of y         | activations.write, gradients.loss
            |     backward     dy <- gradients; residuals <- their slot   | gradients.read, compute.residuals
            |                  dx -> gradients, or through `first`        | gradients.write
            |     input_grad   as backward, but dw waits in the residuals | (the same)
            |     weight_grad  dw <- residuals                            | compute.residuals
            | 3 last        all ranks make the loss of one microbatch     | ends.last, activations.last
            |   first_back  all ranks take dx through `first`             | ends.first_back, gradients.first_back
            | 4 exchange    activations move one rank on                  | forward[1].send, .receive, .is_active
            |               gradients move one rank back                  | backward[-1].send, .receive, .is_active
            +-------------------------------------------------------------+

Steps 1 and 3 happen only where the ends of the model run on all ranks together (`Ends`). A slot is a position in one of
three buffers of a rank (activations, gradients, residuals); `NONE` means that the step does not happen on that rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from ...schedules import Placement

NONE = -1
"""Entry of a column for "not on this rank in this turn"."""

IDLE, FORWARD, BACKWARD, INPUT_GRAD, WEIGHT_GRAD = range(5)
"""Values of `Compute.kind`."""

Ends = Literal["alone", "together"]
"""Who runs `first` and `last`: the first and the last stage, or all ranks at once."""

Offload = Literal["none", "residuals"]
"""What waits in the memory of the host: nothing, or residuals whose backward is far off."""

Gathers = Literal["none", "chunks"]
"""Whether whole chunks of weights that devices keep parts of are gathered by the table, for runs of actions."""

Column = Any
"""int32 [turns, ranks] or [turns] in `Tables`; one turn of it, [ranks] or [], in the scan; [] at one rank."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Compute:
    """The action of each rank, columns [turns, ranks].

    kind: IDLE, FORWARD, BACKWARD, INPUT_GRAD or WEIGHT_GRAD.
    microbatch, chunk, stage: what it runs on; the stage is this rank's chunk by the schedule's placement.
    residuals: slot that the forward writes, and that the backward or both of its halves read.
    """

    kind: Column
    microbatch: Column
    chunk: Column
    stage: Column
    residuals: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ActivationSlots:
    """Slots of the activations buffer, columns [turns, ranks].

    read: input of a forward; NONE on the first stage with ends alone.
    write: output of a forward, until it is sent or taken; NONE on the last stage with ends alone.
    first: where the output of `first` goes, on the rank of the first stage; ends together only.
    last: where the output of the last stage is, on the rank of that stage; ends together only.
    """

    read: Column
    write: Column
    first: Column
    last: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class HostSlots:
    """Copies of residuals to the memory of the host and back, columns [turns, ranks].

    send, store: slot of the residuals that a copy leaves from after the action, and slot on the host.
    load, receive: slot on the host that a copy leaves from before the action, and slot that has it after the action.
    """

    send: Column
    store: Column
    load: Column
    receive: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class WeightSlots:
    """Slots of whole chunks of weights, columns [turns, ranks]: see `schedules/chunk_weights.py`.

    gather: slot into which the chunk of an action is gathered before it; NONE where it is there already.
    read: slot that the action reads.
    """

    gather: Column
    read: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GradientSlots:
    """Slots of the gradients buffer, columns [turns, ranks].

    read: gradient of a stage's output, read by its backward or input-gradient half.
    write: gradient of a stage's input, until it is sent or taken; NONE on the first stage with ends alone.
    loss: where the gradient of the last stage's output goes when the loss is computed.
    first_back: where the gradient of the first stage's input is; ends together only.
    """

    read: Column
    write: Column
    loss: Column
    first_back: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Messages of one kind to the neighbours on one side, at the end of a tick's last turn.

    send, receive: slot to send from and slot to receive into, [turns, ranks].
    is_active: 1 in turns where any rank sends, else 0, [turns].
    """

    send: Column
    receive: Column
    is_active: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class EndTurns:
    """Microbatch whose ends all ranks run together in a turn, columns [turns]; NONE everywhere for ends alone."""

    first: Column
    last: Column
    first_back: Column


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Turns:
    """All columns. `lax.scan` over it gives one turn of all ranks, `at_rank` one turn of one rank.

    forward, backward: transfers of activations and of gradients, by the offset of the receiver's rank, 1 or -1. In a
        loop activations move one rank on and gradients one back; in a V each moves both ways.
    host: copies of residuals; None if all of them stay on the device.
    weights: chunks of weights that are gathered; None if the table gathers none.
    """

    compute: Compute
    activations: ActivationSlots
    gradients: GradientSlots
    forward: dict[int, Transfer]
    backward: dict[int, Transfer]
    ends: EndTurns
    host: HostSlots | None = None
    weights: WeightSlots | None = None

    def at_rank(self, rank: jax.Array) -> "Turns":
        """Return one rank's entries [] of one turn."""
        return at_rank(self, rank)


def at_rank(columns: Any, rank: jax.Array) -> Any:
    """Return one rank's entries [] of one turn, given a tree of columns [ranks] or []."""
    return jax.tree.map(lambda column: column[rank] if column.ndim else column, columns)


@dataclass(frozen=True, kw_only=True)
class Steady:
    """A run of turns in pairs, in which every rank runs a forward and then a backward.

    start, stop: first turn, and the one after the last.
    ends: whether the ends run together in every pair, in some, or never: x is made in the backward turn, the loss in
        the forward turn, where also dx is taken of the pair before.
    forward, backward: offsets of the transfers that happen in every pair; the others happen in none.
    """

    start: int
    stop: int
    ends: Literal["always", "sometimes", "never"]
    forward: tuple[int, ...]
    backward: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """A lowered schedule: int32 columns of all turns, the number of slots of each buffer, and the steady state."""

    turns: Turns
    placement: Placement
    num_activation_slots: int
    num_gradient_slots: int
    num_residual_slots: int
    num_host_slots: int = 0
    num_weight_slots: int = 0
    steady: Steady | None = None

    @property
    def num_turns(self) -> int:
        """Number of turns, one or more for each tick."""
        return len(self.turns.compute.kind)

    @property
    def has_halves(self) -> bool:
        """Whether the backward is split into input-gradient and weight-gradient actions."""
        return bool((self.turns.compute.kind == INPUT_GRAD).any())


def empty_turns(*, num_turns: int, placement: Placement, offload: Offload = "none", gathers: Gathers = "none") -> Turns:
    """Return columns in which every rank is idle and every slot is NONE, to be filled in place."""

    def per_rank(fill: int = NONE) -> Column:
        return np.full((num_turns, placement.num_ranks), fill, np.int32)

    def per_turn(fill: int = NONE) -> Column:
        return np.full(num_turns, fill, np.int32)

    def transfer() -> Transfer:
        return Transfer(send=per_rank(), receive=per_rank(), is_active=per_turn(0))

    return Turns(
        compute=Compute(
            kind=per_rank(IDLE), microbatch=per_rank(), chunk=per_rank(), stage=per_rank(), residuals=per_rank()
        ),
        activations=ActivationSlots(read=per_rank(), write=per_rank(), first=per_rank(), last=per_rank()),
        gradients=GradientSlots(read=per_rank(), write=per_rank(), loss=per_rank(), first_back=per_rank()),
        forward={offset: transfer() for offset in placement.links(1)},
        backward={offset: transfer() for offset in placement.links(-1)},
        ends=EndTurns(first=per_turn(), last=per_turn(), first_back=per_turn()),
        host=HostSlots(send=per_rank(), store=per_rank(), load=per_rank(), receive=per_rank())
        if offload == "residuals"
        else None,
        weights=WeightSlots(gather=per_rank(), read=per_rank()) if gathers == "chunks" else None,
    )
