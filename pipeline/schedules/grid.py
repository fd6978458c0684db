"""A schedule as a value: which rank does what in which tick. It prints, parses and checks itself.

A tick is one turn of the executor's loop. In it a rank runs the actions of its cell in order, then all ranks pass on
what they made: a result is at its neighbour in the next tick. Read `one_f_one_b.py` next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...meshes.errors import ScheduleError
from ...meshes.notebook import picture_html
from .action import Action
from .check import check_actions

Cell = tuple[Action, ...]
IDLE = "."


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Actions by tick and rank; stage s runs on rank s % num_ranks as its chunk s // num_ranks.

    >>> print(Schedule.parse("0F0 .  0B0 ; . 1F0+1B0 .", name="mine", num_microbatches=1))
    rank 0 | 0F0       . 0B0
    rank 1 |   . 1F0+1B0   .

    Raises:
        ScheduleError: an action is missing, doubled, misplaced or too early; the text shows the grid with an arrow.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    ticks: tuple[tuple[Cell, ...], ...]
    num_chunks: int = 1

    def __post_init__(self) -> None:
        check_actions(self)

    @property
    def num_stages(self) -> int:
        """Number of stages, num_ranks x num_chunks."""
        return self.num_ranks * self.num_chunks

    @property
    def num_ticks(self) -> int:
        """Number of turns of the executor's loop."""
        return len(self.ticks)

    def placed(self) -> Iterator[tuple[int, int, Action]]:
        """Yield (tick, rank, action) in the order of execution."""
        for tick, cells in enumerate(self.ticks):
            for rank, cell in enumerate(cells):
                for action in cell:
                    yield tick, rank, action

    @classmethod
    def from_ticks(
        cls, ticks_of: Sequence[dict[int, list[Action]]], *, name: str, num_microbatches: int, num_chunks: int = 1
    ) -> "Schedule":
        """Return the schedule given, for each rank, its actions by tick.

        Raises:
            ScheduleError: the schedule cannot run.
        """
        num_ticks = 1 + max((tick for rank in ticks_of for tick in rank), default=-1)
        ticks = tuple(tuple(tuple(rank.get(tick, ())) for rank in ticks_of) for tick in range(num_ticks))
        return cls(
            name=name, num_ranks=len(ticks_of), num_chunks=num_chunks, num_microbatches=num_microbatches, ticks=ticks
        )

    @classmethod
    def parse(cls, text: str, *, name: str, num_microbatches: int, num_chunks: int = 1) -> "Schedule":
        """Return the schedule drawn as `str()` draws it: a line (or `;`) a rank, a word a tick, `+` within a tick.

        Raises:
            ScheduleError: a word is no action, the lines differ in length, or the schedule cannot run.
        """
        lines = [line.split("|")[-1].split() for line in text.replace(";", "\n").splitlines() if line.strip()]
        if len({len(line) for line in lines}) > 1:
            lengths = ", ".join(f"rank {rank}: {len(line)}" for rank, line in enumerate(lines))
            raise ScheduleError(f"the lines of a grid have as many cells; here {lengths}.", fix=f"fill with {IDLE!r}.")
        grid = [[_parse_cell(word) for word in line] for line in lines]
        return cls(
            name=name,
            num_ranks=len(grid),
            num_chunks=num_chunks,
            num_microbatches=num_microbatches,
            ticks=tuple(zip(*grid, strict=True)),
        )

    def __str__(self) -> str:
        words = [["+".join(map(str, cells[rank])) or IDLE for cells in self.ticks] for rank in range(self.num_ranks)]
        widths = [max(map(len, column)) for column in zip(*words, strict=True)]
        lines = [" ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)) for line in words]
        return "\n".join(f"rank {rank} | {line}" for rank, line in enumerate(lines))

    def _repr_html_(self) -> str:
        """Return the picture of the schedule as HTML, which a notebook shows."""
        # `draw.py` imports this file. So it is reached through the room, and only when somebody wants the picture.
        from . import draw_picture

        sizes = f"{self.num_ranks} ranks, {self.num_microbatches} microbatches"
        return picture_html(draw_picture(self, format="svg"), format="svg", alt=f"{self.name}: {sizes}")


def _parse_cell(word: str) -> Cell:
    return () if word == IDLE else tuple(Action.parse(part) for part in word.split("+"))
