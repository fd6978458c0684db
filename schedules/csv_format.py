"""Read and write schedules as CSV: one row per rank, one cell per tick, `+` between actions, an empty cell for idle.

A file gives the order of each rank; ticks are computed again from it, and the placement follows from the rows in which
a stage's actions are (`row_placement.py`). Files of torch.distributed.pipelining load: their sends, all-gathers and
reductions are left out, since the executor inserts these itself; `(0F3;3B1)OVERLAP_F_B` is read as its actions, one
after the other; and where some backwards are whole and others split, as in DualPipeV, all are split. Torch 2.5 wrote B
for the input gradient where there is a W; such files load too. A schedule with at most one action per cell is saved in
torch's compute-only format.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from ..meshes.errors import ScheduleError, suggest
from ..meshes.files.regular_file import read_bounded
from .action import Action, Kind
from .grid import IDLE, cell_text
from .orders import schedule_from_orders
from .row_placement import Home, find_home
from .schedule import Schedule
from .vocab import Vocab, check_vocab

_HALVES: tuple[Kind, ...] = ("I", "W")
_LONGEST_CELL = 24
_MOST_ACTIONS = 60_000
"""Three actions for each of 20,000 microbatches, the most that the command line takes."""
_MOST_BYTES = 16 << 20

_COMMUNICATION = re.compile(r"[0-9]+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)(?:[0-9]+)?")
"""Actions of torch.distributed.pipelining that our executor runs by itself."""

_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")
"""A forward and a backward that torch runs side by side."""


def load_schedule(path: str | Path, *, vocab: Vocab = "ends", say: Callable[[str], None] = lambda _: None) -> Schedule:
    """Read a schedule from a CSV file; its name is that of the file.

    >>> load_schedule("mine.csv").num_ranks
    4

    Args:
        say: receives messages about actions that were left out and about ticks that changed.

    Raises:
        ScheduleError: the file is missing or empty, a cell is not an action, or the order cannot run.
    """
    check_vocab(vocab)
    path = Path(path)
    try:
        text = read_bounded(path, max_bytes=_MOST_BYTES, error=ScheduleError).decode("utf-8-sig")
    except ScheduleError:
        raise
    except FileNotFoundError as error:
        near = suggest(path.name, [file.name for file in path.parent.glob("*") if file.is_file()])
        raise ScheduleError(f"there is no file {str(path)!r}.{near}", fix="give the path of a CSV file.") from error
    except UnicodeDecodeError as error:
        raise ScheduleError(f"{str(path)!r} is not text in UTF-8.", fix="save it as CSV.") from error
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise ScheduleError(f"{str(path)!r} cannot be read: {why}.", fix="give the path of a CSV file.") from error
    return schedule_from_csv(text, name=path.name, vocab=vocab, say=say)


def schedule_from_csv(
    text: str, *, name: str, vocab: Vocab = "ends", say: Callable[[str], None] = lambda _: None
) -> Schedule:
    r"""Parse a schedule that runs each row's actions in their order; ticks, chunks and microbatches are computed.

    >>> print(schedule_from_csv("0F0,,0B0\n,1F0,1B0\n", name="mine"))
    rank 0 | 0F0   .   . 0B0
    rank 1 |   . 1F0 1B0   .

    Args:
        say: receives messages about actions that were left out and about ticks that changed.

    Raises:
        ScheduleError: a cell is not an action, an action is on the wrong rank, repeated or missing, or the ranks wait
            for each other.
    """
    rows = _drop_communication(_split_rows(text, name), say)
    cells = _split_wholes(_read_old_backwards(list(_read_actions(rows, name))), say)
    home = find_home([(rank, action) for rank, _, action in cells], num_ranks=len(rows), name=name)
    orders: list[list[Action]] = [[] for _ in rows]
    seen: dict[Action, str] = {}
    for rank, column, action in cells:
        place = f"{name}, {_place_text(rank, column)}"
        home.check(action, rank, place=place)
        if action in seen:
            raise ScheduleError(f"{place}: {action} a second time; the first is in {seen[action]}.")
        seen[action] = _place_text(rank, column)
        orders[rank].append(action)
    _check_complete(seen, name, home=home)
    num_chunks = 1 + max(action.stage for action in seen) // len(rows)
    schedule = schedule_from_orders(
        orders,
        name=name,
        num_microbatches=1 + max(action.microbatch for action in seen),
        num_chunks=num_chunks,
        placement=home.placement(num_chunks),
        vocab=vocab,
    )
    _report_moved(schedule, {action: column for _, column, action in cells}, say)
    return schedule


def schedule_to_csv(schedule: Schedule) -> str:
    r"""Return the schedule as CSV, which is torch's compute-only format if every cell has at most one action.

    >>> schedule_to_csv(build_schedule("gpipe", num_ranks=1, num_microbatches=2))
    '0F0,0F1,0B0,0B1\n'
    """
    lines = (",".join(cell_text(cells[rank]) for cells in schedule.ticks) for rank in range(schedule.num_ranks))
    return "".join(f"{line}\n" for line in lines)


def _split_rows(text: str, name: str) -> list[list[str]]:
    try:
        # An empty line is not a rank: a rank that is idle throughout still has its commas.
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    except csv.Error as error:
        raise ScheduleError(f"{name} is not CSV: {error}.", fix="write a row a rank and a cell a tick.") from error
    if not any(cell.strip() for row in rows for cell in row):
        raise ScheduleError(f"{name} is empty.", fix="write a row a rank and a cell a tick, such as 0F0,,0B0.")
    return rows


def _drop_communication(rows: list[list[str]], say: Callable[[str], None]) -> list[list[str]]:
    """Empty the cells with torch's sends, gathers and reductions, and say how many there were."""
    found = [match[1] for row in rows for cell in row if (match := _COMMUNICATION.fullmatch(cell.strip()))]
    if found:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(found).items()))
        say(f"left out {counts}: sends, gathers and sums of gradients come by themselves")
    return [["" if _COMMUNICATION.fullmatch(cell.strip()) else cell for cell in row] for row in rows]


def _report_moved(schedule: Schedule, columns: dict[Action, int], say: Callable[[str], None]) -> None:
    """Say how many actions run at other ticks than their columns in the file."""
    ticks = {action: tick for tick, cells in enumerate(schedule.ticks) for cell in cells for action in cell}
    moved = [action for action, column in columns.items() if ticks[action] != column]
    if moved:
        first = min(moved, key=columns.__getitem__)
        say(
            f"the order of the file is kept, its ticks are not: {len(moved)} of {len(columns)} actions run at others, "
            f"the first of them {first} at tick {ticks[first]}, not {columns[first]}"
        )


def _read_actions(rows: Sequence[Sequence[str]], name: str) -> Iterator[tuple[int, int, Action]]:
    _check_size(rows, name)
    for rank, row in enumerate(rows):
        for column, cell in enumerate(row):
            if cell.strip() in {"", IDLE}:
                continue
            pair = _OVERLAP.fullmatch(cell.strip())
            for word in pair[1].split(";") if pair else cell.split("+"):
                yield rank, column, _parse_action(word, f"{name}, {_place_text(rank, column)}")


def _place_text(rank: int, column: int) -> str:
    return f"row {rank + 1}, column {column + 1}"


def _check_size(rows: Sequence[Sequence[str]], name: str) -> None:
    num_actions = sum(
        1 + cell.count("+") + cell.count(";") for row in rows for cell in row if cell and not cell.isspace()
    )
    if num_actions > _MOST_ACTIONS:
        raise ScheduleError(
            f"{name} has {num_actions:,} actions; {_MOST_ACTIONS:,} are the most.",
            fix="write a file of fewer microbatches: the pattern repeats.",
        )


def _read_old_backwards(cells: list[tuple[int, int, Action]]) -> list[tuple[int, int, Action]]:
    """Read B as the input gradient, as torch 2.5 meant it, if every B has a W and there is no I."""
    found: dict[str, set[tuple[int, int]]] = {kind: set() for kind in get_args(Kind)}
    for _, _, action in cells:
        found[action.kind].add((action.stage, action.microbatch))
    if found["I"] or not found["W"] or found["B"] != found["W"]:
        return cells
    return [(rank, column, replace(a, kind="I") if a.kind == "B" else a) for rank, column, a in cells]


def _split_wholes(cells: list[tuple[int, int, Action]], say: Callable[[str], None]) -> list[tuple[int, int, Action]]:
    """Split whole backwards if other backwards of the file are split."""
    num_wholes = sum(action.kind == "B" for _, _, action in cells)
    if not num_wholes or not any(action.kind in "IW" for _, _, action in cells):
        return cells
    say(f"split {num_wholes} whole backwards into I and W, since the other backwards are split")
    return [
        (rank, column, replace(action, kind=kind))
        for rank, column, action in cells
        for kind in (_HALVES if action.kind == "B" else (action.kind,))
    ]


def _parse_action(word: str, place: str) -> Action:
    if len(word) > _LONGEST_CELL:
        word = f"{word[:_LONGEST_CELL]}..."
    try:
        return Action.parse(word)
    except ScheduleError as error:
        raise ScheduleError(f"{place}: {error.problem}", fix=f"{error.fix} Cells are separated by commas.") from error


def _check_complete(seen: dict[Action, str], name: str, *, home: Home) -> None:
    """Raise unless all actions are there.

    This comes before the placement into ticks, where a missing action would look like a wrong order.
    """
    num_stages = home.num_ranks * (1 + max(action.stage for action in seen) // home.num_ranks)
    num_microbatches = 1 + max(action.microbatch for action in seen)
    has_halves = any(action.kind in "IW" for action in seen)
    kinds: tuple[Kind, ...] = ("F", *_HALVES) if has_halves else ("F", "B")
    # Lazy, so that the first missing action ends it even if the file names stage 99999999998.
    wanted = (
        Action(stage=stage, kind=kind, microbatch=microbatch)
        for stage in range(num_stages)
        for microbatch in range(num_microbatches)
        for kind in kinds
    )
    missing = next((action for action in wanted if action not in seen), None)
    if missing:
        raise ScheduleError(
            f"{name} never runs {missing}; {home.num_ranks} rows with stages to {num_stages - 1} and microbatches to "
            f"{num_microbatches - 1} need {num_stages * num_microbatches * len(kinds)} actions, not {len(seen)}.",
            fix=f"add {missing} to row {home.rank_of(missing.stage) + 1}.",
        )
