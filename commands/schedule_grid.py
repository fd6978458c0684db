"""Draw the grid of a schedule, with a colour for each kind of action, within the width of a terminal."""

from rich.text import Text

from ..schedules import Schedule
from ..schedules.grid import IDLE, column_widths, grid_words

_STYLES = {"F": "white on blue", "B": "black on green", "I": "black on cyan", "W": "black on yellow"}
"""Colours of forwards, whole backwards, input gradients and weight gradients."""


def draw_grid(schedule: Schedule, *, width: int | None) -> Text:
    """Draw a schedule as a grid, a line for each rank and a column for each tick.

    Args:
        width: columns of the terminal; where the grid is wider, it is drawn in blocks of whole ticks below each other.
            None does not limit it.
    """
    words = grid_words(schedule.ticks, num_ranks=schedule.num_ranks)
    widths = column_widths(words)
    heads = [f"rank {rank}".ljust(len(f"rank {schedule.num_ranks - 1}")) + " |" for rank in range(schedule.num_ranks)]
    text = Text()
    for first, last in _split_blocks(widths, room=None if width is None else width - len(heads[0])):
        if first or last < len(widths):
            blank_line = "\n" if first else ""
            text.append(f"{blank_line}ticks {first} to {last - 1}\n", style="bold")
        for head, row in zip(heads, words, strict=True):
            text.append(head)
            for word, size in zip(row[first:last], widths[first:last], strict=True):
                text.append(" " * (1 + size - len(word)))
                _append_cell(text, word)
            text.append("\n")
    text.right_crop(1)
    return text


def _split_blocks(widths: list[int], *, room: int | None) -> list[tuple[int, int]]:
    """Split ticks of these widths into blocks (first, end) of whole ticks that fit into `room` columns."""
    blocks, first, used = [], 0, 0
    for tick, size in enumerate(widths):
        if room is not None and tick > first and used + size + 1 > room:
            blocks.append((first, tick))
            first, used = tick, 0
        used += size + 1
    return [*blocks, (first, len(widths))]


def _append_cell(text: Text, word: str) -> None:
    """Append a cell of the grid, each action in the colour of its kind; `.` is an idle tick."""
    if word == IDLE:
        text.append(word, style="dim")
        return
    for number, part in enumerate(word.split("+")):
        text.append("+" if number else "")
        text.append(part, style=next(style for kind, style in _STYLES.items() if kind in part))
