"""Build a V-shaped schedule from its building block: the passes of one microbatch, repeated every six ticks.

Six ticks, because a rank runs a forward, an input gradient and a weight gradient in each of its two chunks. A block
passes the ranks four times: forwards of chunk 0 there, of chunk 1 back, input gradients of chunk 1 there, of chunk 0
back. With v-min each sweep moves a rank a tick; on 3 ranks the third begins 3 ticks after the second, so that no passes
collide when the block repeats. F and I of chunk 0 are in capitals, of chunk 1 in small letters:

    one block      rank 0 | F . . . . f . . i . . . . I      repeated   F0 .  .  .  .  f0 F1 .  i0 .  .  f1 F2 I0 i1
                   rank 1 | . F . . f . . . . i . . I .                 .  F0 .  .  f0 .  .  F1 .  i0 f1 .  I0 F2 .
                   rank 2 | . . F f . . . . . . i I . .                 .  .  F0 f0 .  .  .  .  F1 f1 i0 I0 .  .  F2

The longer a microbatch lives on a rank, from F to I, the more of them it holds, so the speed of the sweeps decides the
memory ("Pipeline Parallelism with Controllable Memory", Qi et al. 2024). Weight gradients fill ticks that stay free.
Then the ramps are filled: each pass moves to the earliest free tick after what it needs, as long as its rank never
holds more than the limit. `v_shaped.py` has the three speeds and limits.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from ...meshes.errors import ScheduleError
from ..action import Action, Kind
from ..check import check_sizes, needs
from ..orders import fill_ticks
from ..placement import Placement
from ..schedule import Schedule

_PERIOD = 6


@dataclass(frozen=True, kw_only=True)
class Block:
    """Ticks from a rank to the next in each of a microbatch's four sweeps along the ranks, in the order of time.

    `forward` is of chunk 0, then chunk 1; `backward` of chunk 1, then chunk 0. Where both sweeps of a chunk take d
    ticks a rank together, a rank holds a microbatch for 2 d p ticks in all, as two chunks, and so d p / 3 at any time.
    """

    forward: tuple[int, int]
    backward: tuple[int, int]

    def starts(self, num_ranks: int, turns: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
        """Return the ticks of a rank's four passes, by rank, if the sweeps turn round after these many ticks."""
        there, back = range(num_ranks), range(num_ranks)[::-1]
        distances, start = [], 0
        for step, turn, ranks in zip(
            (*self.forward, *self.backward), (*turns, 0), (there, back, there, back), strict=True
        ):
            distances.append([start + step * place for place in ranks])
            start += step * (num_ranks - 1) + turn
        return list(zip(*distances, strict=True))


THIRD_BLOCK = Block(forward=(1, 1), backward=(1, 1))
HALF_BLOCK = Block(forward=(2, 1), backward=(2, 1))
TWO_THIRDS_BLOCK = Block(forward=(2, 2), backward=(2, 2))
WHOLE_BLOCK = Block(forward=(4, 2), backward=(4, 2))
"""Blocks with d = 2, 3, 4 and 6, named by the share of the activations of 1F1B that a rank holds at least."""


def build_from_block(block: Block, *, name: str, num_ranks: int, num_microbatches: int, limit: int) -> Schedule:
    """Build the schedule that repeats a block and holds at most `limit` microbatches of a chunk on any rank.

    Raises:
        ScheduleError: a count is below 1, or microbatches live too long for the limit.
    """
    check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    placement = Placement.of("v", num_ranks=num_ranks, num_chunks=2)
    rows = _repeat(block, placement, num_microbatches=num_microbatches, limit=limit)
    _pull_ahead(rows, limit=limit)
    orders = [list(row.with_weight_grads()) for row in rows]
    return Schedule(
        name=name,
        num_ranks=num_ranks,
        num_chunks=2,
        placement=placement,
        num_microbatches=num_microbatches,
        ticks=fill_ticks(orders, width=1, num_chunks=2, name=name),
    )


def _repeat(block: Block, placement: Placement, *, num_microbatches: int, limit: int) -> list["_Row"]:
    """Return the rows of the repeated block, with the shortest turns that collide nowhere and keep the limit."""
    delays = range(1, _PERIOD + 1)
    for turns in sorted(product(delays, delays, delays), key=lambda turns: (sum(turns), turns)):
        starts = block.starts(placement.num_ranks, turns)
        if all(len({tick % _PERIOD for tick in own}) == len(own) for own in starts):
            stages = map(placement.stages_of, range(placement.num_ranks))
            rows = [_Row(_passes(own, mine, num_microbatches)) for own, mine in zip(starts, stages, strict=True)]
            if max(row.peak for row in rows) <= limit:
                return rows
    raise ScheduleError(
        f"no repetition of {block} on {placement.num_ranks} ranks holds at most {limit} microbatches of a chunk.",
        fix="allow more in flight, or sweep faster.",
    )


def _passes(starts: Sequence[int], stages: Sequence[int], num_microbatches: int) -> list[Action | None]:
    """Return a rank's forwards and input gradients by tick, given the ticks of the first microbatch."""
    first, last = stages
    kinds: tuple[Kind, ...] = ("F", "F", "I", "I")
    passes: list[Action | None] = [None] * (max(starts) + _PERIOD * (num_microbatches - 1) + 1)
    for start, stage, kind in zip(starts, (first, last, last, first), kinds, strict=True):
        for microbatch in range(num_microbatches):
            passes[start + _PERIOD * microbatch] = Action(stage=stage, kind=kind, microbatch=microbatch)
    return passes


def _pull_ahead(rows: list["_Row"], *, limit: int) -> None:
    """Move every pass to the earliest free tick after what it needs in which its rank still keeps the limit."""
    placed = sorted((tick, rank) for rank, row in enumerate(rows) for tick, action in enumerate(row.passes) if action)
    tick_of: dict[Action, int] = {}
    # In the order of ticks, so that whatever a pass needs has moved before it.
    for tick, rank in placed:
        action = rows[rank].passes[tick]
        assert action is not None
        needed = needs(action, num_stages=2 * len(rows), has_halves=True)
        if action.microbatch:
            # Microbatches keep their order within a stage.
            needed.append(Action(stage=action.stage, kind=action.kind, microbatch=action.microbatch - 1))
        ready = 1 + max((tick_of[other] for other in needed), default=-1)
        tick_of[action] = next(
            (earlier for earlier in range(ready, tick) if rows[rank].move(tick, earlier, limit=limit)), tick
        )


class _Row:
    """The passes of a rank by tick: forwards and input gradients, with None where a weight gradient can run.

    A weight gradient runs in the first free tick after its input gradient. `states` says how many microbatches of a
    chunk are held and how many weight gradients wait, before each tick and at the end.
    """

    def __init__(self, passes: list[Action | None]) -> None:
        self.passes = passes
        self.states = [(0, 0)]
        for action in passes:
            self.states.append(_step(self.states[-1], action))

    @property
    def peak(self) -> int:
        """The most microbatches of a chunk that are held."""
        return max(held for held, _ in self.states)

    def move(self, tick: int, earlier: int, *, limit: int) -> bool:
        """Move a pass to an earlier tick if that is free and the limit is kept; return whether it was moved."""
        if self.passes[earlier] is not None:
            return False
        self.passes[earlier], self.passes[tick] = self.passes[tick], None
        state, changed = self.states[earlier], []
        for at in range(earlier, len(self.passes)):
            # After the old tick the row is as it was, once as many microbatches and weight gradients are left.
            if at > tick and state == self.states[at]:
                break
            state = _step(state, self.passes[at])
            if state[0] > limit:
                self.passes[tick], self.passes[earlier] = self.passes[earlier], None
                return False
            changed.append(state)
        self.states[earlier + 1 : earlier + 1 + len(changed)] = changed
        return True

    def with_weight_grads(self) -> Iterator[Action]:
        """Yield all actions in order."""
        waiting: deque[Action] = deque()
        for action in self.passes:
            if action is not None:
                yield action
                if action.kind == "I":
                    waiting.append(Action(stage=action.stage, kind="W", microbatch=action.microbatch))
            elif waiting:
                yield waiting.popleft()
        yield from waiting


def _step(state: tuple[int, int], action: Action | None) -> tuple[int, int]:
    """Return how many microbatches are held and how many weight gradients wait after a tick."""
    held, waiting = state
    if action is None:
        return (held - 1, waiting - 1) if waiting else state
    return (held + 1, waiting) if action.kind == "F" else (held, waiting + 1)
