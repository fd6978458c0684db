"""The text form of a schedule: one line per rank, one cell per tick.

    rank 0 | 0F0 0F1       .   . 0B0 0B1
    rank 1 |   . 1F0 1F1+1B0 1B1   .   .

`.` is an idle cell, and `+` joins the actions that a rank runs in order within one tick. Schedules print in this form,
errors show its last ticks with an arrow, the command line colours it, and CSV files use the same cells. Read
`check.py` for the rules that a grid must meet.
"""

from collections.abc import Sequence

from ..meshes.errors import ScheduleError
from .action import Action

Cell = tuple[Action, ...]
"""Actions of one rank in one tick, in order; empty where the rank is idle."""

Ticks = tuple[tuple[Cell, ...], ...]
"""Cells by tick, then by rank."""

IDLE = "."
"""Text of an idle cell."""


def cell_text(cell: Cell) -> str:
    """Return the actions of a cell joined by `+`; an empty text if it is idle."""
    return "+".join(map(str, cell))


def grid_words(ticks: Ticks, *, num_ranks: int) -> list[list[str]]:
    """Return the text of every cell by rank, then by tick."""
    return [[cell_text(cells[rank]) or IDLE for cells in ticks] for rank in range(num_ranks)]


def column_widths(words: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of every tick's column: that of its longest cell."""
    return [max(map(len, column)) for column in zip(*words, strict=True)]


def draw_grid(ticks: Ticks, *, num_ranks: int) -> list[str]:
    """Return one line per rank, with the cells of a tick in one right-aligned column."""
    words = grid_words(ticks, num_ranks=num_ranks)
    widths = column_widths(words)
    lines = [" ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in words]
    return [f"rank {rank} | {line}" for rank, line in enumerate(lines)]


def parse_grid(text: str) -> list[list[Cell]]:
    """Return the cells by rank, then by tick, of a grid as `draw_grid` draws it.

    `;` ends a line too, and the part before `|` may be left out.

    Raises:
        ScheduleError: a cell is not an action, or the lines differ in length.
    """
    lines = [line.split("|")[-1].split() for line in text.replace(";", "\n").splitlines() if line.strip()]
    if len({len(line) for line in lines}) > 1:
        lengths = ", ".join(f"rank {rank}: {len(line)}" for rank, line in enumerate(lines))
        raise ScheduleError(f"the lines of a grid have as many cells; here {lengths}.", fix=f"fill with {IDLE!r}.")
    return [[_parse_cell(word) for word in line] for line in lines]


def _parse_cell(word: str) -> Cell:
    return () if word == IDLE else tuple(Action.parse(part) for part in word.split("+"))
