"""Place each rank's order of actions into ticks, every action as early as the executor can run it.

    orders                     ticks, one action each
    rank 0 | 0F0 0F1 0B0 0B1   rank 0 | 0F0 0F1   . 0B0   . 0B1
    rank 1 | 1F0 1B0 1F1 1B1   rank 1 |   . 1F0 1B0 1F1 1B1   .

Read `schedule.py` for what a tick is.
"""

from collections.abc import Sequence

from ..meshes.errors import ScheduleError
from .action import Action
from .check import check_sizes, needs
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
    sources = _find_sources(orders, num_chunks=num_chunks)
    last = len(orders) * num_chunks - 1
    tick_of: dict[Action, int] = {}
    next_of = [0] * len(orders)
    ticks: list[tuple[Cell, ...]] = []

    def is_ready(action: Action, cell: Cell) -> bool:
        # With a split vocabulary the loss is computed after the tick of the last forward: see `vocab.py`.
        if vocab == "split" and action.stage == last and action.kind in ("B", "I"):
            cell = ()
        return all(other in cell or tick_of.get(other, len(ticks)) < len(ticks) for other in sources[action])

    def fill(order: Sequence[Action]) -> Cell:
        # As many of the rank's next actions as can run in this tick: the first that cannot ends the cell.
        cell: Cell = ()
        for action in order:
            if action.kind in {other.kind for other in cell} or not is_ready(action, cell):
                break
            cell = (*cell, action)
        return cell

    while any(place < len(order) for place, order in zip(next_of, orders, strict=True)):
        cells = tuple(fill(order[place : place + width]) for place, order in zip(next_of, orders, strict=True))
        # No rank has anything to run although some are not done: each waits for another.
        if not any(cells):
            raise ScheduleError(
                _draw_deadlock(orders, next_of, name),
                fix="move what is waited for to an earlier place in its rank's order.",
            )
        for rank, cell in enumerate(cells):
            next_of[rank] += len(cell)
            tick_of.update(dict.fromkeys(cell, len(ticks)))
        ticks.append(cells)
    return tuple(ticks)


def _find_sources(orders: Orders, *, num_chunks: int) -> dict[Action, list[Action]]:
    """Return what each action needs."""
    actions = [action for order in orders for action in order]
    has_halves = any(action.kind == "I" for action in actions)
    return {action: needs(action, num_stages=len(orders) * num_chunks, has_halves=has_halves) for action in actions}


def _draw_deadlock(orders: Orders, next_of: Sequence[int], name: str) -> str:
    lines = [
        f"  rank {rank} | {' '.join(map(str, order[max(0, place - 4) : place]))} -> "
        + (f"{order[place]}  <-- waits" if place < len(order) else "done")
        for rank, (order, place) in enumerate(zip(orders, next_of, strict=True))
    ]
    return f"schedule {name!r} cannot run: no rank can go on.\n" + "\n".join(lines)
