"""List what a schedule sends: activations and gradients that cross from a rank to its neighbour at the end of a tick.

    v, 2 ranks x 2 chunks      tick  from  to  what          stages
    rank 0 | 0F0   .   . 3F0      0     0   1  activation 0   0 -> 1
    rank 1 |   . 1F0 2F0   .      2     1   0  activation 0   2 -> 3

Stage 1 hands its activation to stage 2 on the same rank: in the turn of a V nothing is sent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..meshes.columns import align
from .action import Action
from .grid import Ticks
from .placement import Placement


@dataclass(frozen=True, kw_only=True)
class Message:
    """One array that is sent at the end of a tick: an activation to the next stage, or a gradient to the one before."""

    tick: int
    sender: int
    receiver: int
    kind: Literal["activation", "gradient"]
    microbatch: int
    from_stage: int
    to_stage: int


def find_message(action: Action, placement: Placement, *, tick: int) -> Message | None:
    """Return the message that an action sends, or None if its result stays on the rank."""
    to_stage = action.stage + (1 if action.kind == "F" else -1)
    if action.kind == "W" or not 0 <= to_stage < len(placement.ranks):
        return None
    sender, receiver = placement.rank_of(action.stage), placement.rank_of(to_stage)
    if sender == receiver:
        return None
    return Message(
        tick=tick,
        sender=sender,
        receiver=receiver,
        kind="activation" if action.kind == "F" else "gradient",
        microbatch=action.microbatch,
        from_stage=action.stage,
        to_stage=to_stage,
    )


def iterate_messages(ticks: Ticks, placement: Placement) -> Iterator[Message]:
    """Yield the messages of a grid by tick, then by sender."""
    for tick, cells in enumerate(ticks):
        for cell in cells:
            for action in cell:
                message = find_message(action, placement, tick=tick)
                if message is not None:
                    yield message


def draw_messages(messages: Iterator[Message] | tuple[Message, ...]) -> str:
    """Return messages as a table, one a line; it has only its head if nothing is sent."""
    rows = [
        (
            str(one.tick),
            str(one.sender),
            str(one.receiver),
            f"{one.kind} {one.microbatch}",
            f"{one.from_stage} -> {one.to_stage}",
        )
        for one in messages
    ]
    return align([("tick", "from", "to", "what", "stages"), *rows], left={3})
