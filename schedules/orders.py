"""Place each rank's order of actions into ticks, every action as early as the executor can run it.

    orders                     ticks, one action each
    rank 0 | 0F0 0F1 0B0 0B1   rank 0 | 0F0 0F1   . 0B0   . 0B1
    rank 1 | 1F0 1B0 1F1 1B1   rank 1 |   . 1F0 1B0 1F1 1B1   .

Read `schedule.py` for what a tick is.
"""

from collections.abc import Sequence
from itertools import accumulate, chain
from operator import lt

from ..meshes.errors import ScheduleError
from .action import Action
from .check import check_sizes, needed_kinds
from .grid import Cell, Ticks
from .placement import LOOP, Placement
from .schedule import Schedule
from .simulate import simulate
from .vocab import Vocab, check_vocab

Orders = Sequence[Sequence[Action]]
"""The actions of each rank, in the order in which it runs them."""

# One action per tick, or up to one of each kind: F, B, I and W.
_WIDTHS = (1, 4)


def schedule_from_orders(
    orders: Orders,
    *,
    name: str,
    num_microbatches: int,
    num_chunks: int = 1,
    placement: Placement = LOOP,
    vocab: Vocab = "ends",
) -> Schedule:
    """Return the schedule that runs these orders in the least lockstep time.

    Two placements are compared: one action per tick, best where all actions take equally long, and up to one of each
    kind per tick, best for a forward beside a whole backward.

    Raises:
        ScheduleError: the ranks wait for each other, or the actions are not those of a schedule.
    """
    check_sizes(num_ranks=len(orders), num_microbatches=num_microbatches, num_chunks=num_chunks)
    check_vocab(vocab)
    return min(
        (
            Schedule(
                name=name,
                num_ranks=len(orders),
                num_chunks=num_chunks,
                placement=placement,
                num_microbatches=num_microbatches,
                ticks=fill_ticks(orders, width=width, num_chunks=num_chunks, name=name, vocab=vocab),
            )
            for width in _WIDTHS
        ),
        key=lambda schedule: simulate(schedule).makespan,
    )


def fill_ticks(orders: Orders, *, width: int, num_chunks: int, name: str, vocab: Vocab = "ends") -> Ticks:
    """Return the ticks that run these orders as early as they can, up to `width` actions of a rank in each.

    Raises:
        ScheduleError: the ranks wait for each other.
    """
    # Actions by their number, since a search makes many schedules of thousands of actions.
    actions = [action for order in orders for action in order]
    sources = _find_sources(actions, num_stages=len(orders) * num_chunks)
    last = len(orders) * num_chunks - 1
    # With a split vocabulary the loss is computed after the tick of the last forward: see `vocab.py`.
    is_after = [vocab == "split" and one.stage == last and one.kind in ("B", "I") for one in actions]
    starts = list(accumulate(map(len, orders), initial=0))
    next_of, ticks = starts[:-1], list[tuple[Cell, ...]]()
    is_done = [False] * (len(actions) + 1)

    def fill(first: int, end: int) -> list[int]:
        # As many of the rank's next actions as can run in this tick: the first that cannot ends the cell.
        cell: list[int] = []
        for number in range(first, min(first + width, end)):
            own = () if is_after[number] else cell
            if any(actions[other].kind == actions[number].kind for other in cell):
                break
            if any(not is_done[other] and other not in own for other in sources[number]):
                break
            cell.append(number)
        return cell

    while any(map(lt, next_of, starts[1:])):
        cells = list(map(fill, next_of, starts[1:]))
        # No rank has anything to run although some are not done: each waits for another.
        if not any(cells):
            raise _explain_deadlock(
                orders, [place - start for place, start in zip(next_of, starts, strict=False)], name
            )
        next_of = [place + len(cell) for place, cell in zip(next_of, cells, strict=True)]
        for number in chain(*cells):
            is_done[number] = True
        ticks.append(tuple(tuple(actions[number] for number in cell) for cell in cells))
    return tuple(ticks)


def _find_sources(actions: Sequence[Action], *, num_stages: int) -> list[list[int]]:
    """Return the numbers of the actions that each one needs; one that is not there has the number after the last."""
    # Of a repeated action, which `Schedule` refuses, the first one counts.
    number_of = {(one.stage, one.kind, one.microbatch): number for number, one in reversed(list(enumerate(actions)))}
    has_halves = any(one.kind == "I" for one in actions)
    return [
        [
            number_of.get((stage, kind, one.microbatch), len(actions))
            for stage, kind in needed_kinds(one.stage, one.kind, num_stages=num_stages, has_halves=has_halves)
        ]
        for one in actions
    ]


def _explain_deadlock(orders: Orders, next_of: Sequence[int], name: str) -> ScheduleError:
    lines = [
        f"  rank {rank} | {' '.join(map(str, order[max(0, place - 4) : place]))} -> "
        + (f"{order[place]}  <-- waits" if place < len(order) else "done")
        for rank, (order, place) in enumerate(zip(orders, next_of, strict=True))
    ]
    return ScheduleError(
        f"schedule {name!r} cannot run: no rank can go on.\n" + "\n".join(lines),
        fix="move what is waited for to an earlier place in its rank's order.",
    )
