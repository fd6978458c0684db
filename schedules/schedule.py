"""A schedule as data: which rank runs which action in which tick.

A tick is one iteration of the executor's loop. Each rank runs the actions of its cell in order, then all ranks exchange
activations and gradients with their neighbours, so a result can be used on another rank in the next tick. Read
`families/one_f_one_b.py` for an example, `simulate.py` for times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..meshes.notebook import picture_html
from .action import Action
from .check import Unchecked, check_actions, check_sizes
from .grid import Ticks, draw_grid, parse_grid
from .messages import Message, iterate_messages
from .placement import LOOP, Placement


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Actions by tick and rank, and the placement of stages on ranks: a loop if left out.

    >>> print(Schedule.parse("0F0 .  0B0 ; . 1F0+1B0 .", name="mine", num_microbatches=1))
    rank 0 | 0F0       . 0B0
    rank 1 |   . 1F0+1B0   .

    Raises:
        ScheduleError: an action is missing, repeated, on another rank or before what it needs; the message shows the
            grid with an arrow.
    """

    name: str
    num_ranks: int
    num_microbatches: int
    ticks: Ticks
    num_chunks: int = 1
    placement: Placement = LOOP

    def __post_init__(self) -> None:
        check_sizes(num_ranks=self.num_ranks, num_microbatches=self.num_microbatches, num_chunks=self.num_chunks)
        given = "loop" if self.placement is LOOP else self.placement
        placement = Placement.resolve(given, num_ranks=self.num_ranks, num_chunks=self.num_chunks)
        object.__setattr__(self, "placement", placement)
        check_actions(
            Unchecked(
                name=self.name,
                num_ranks=self.num_ranks,
                num_microbatches=self.num_microbatches,
                num_chunks=self.num_chunks,
                placement=self.placement,
                ticks=self.ticks,
            )
        )

    @property
    def num_stages(self) -> int:
        """Number of stages, num_ranks x num_chunks."""
        return self.num_ranks * self.num_chunks

    @property
    def num_ticks(self) -> int:
        """Number of iterations of the executor's loop."""
        return len(self.ticks)

    def placed(self) -> Iterator[tuple[int, int, Action]]:
        """Yield (tick, rank, action) in the order of execution."""
        for tick, cells in enumerate(self.ticks):
            for rank, cell in enumerate(cells):
                for action in cell:
                    yield tick, rank, action

    def messages(self) -> tuple[Message, ...]:
        """Return what is sent between ranks, by tick and then by sender.

        >>> build_schedule("gpipe", num_ranks=2, num_microbatches=1).messages()[0].kind
        'activation'
        """
        return tuple(iterate_messages(self.ticks, self.placement))

    @classmethod
    def from_ticks(
        cls,
        ticks_of: Sequence[dict[int, list[Action]]],
        *,
        name: str,
        num_microbatches: int,
        num_chunks: int = 1,
        placement: Placement = LOOP,
    ) -> "Schedule":
        """Return the schedule of the given actions by rank, then by tick.

        Raises:
            ScheduleError: the schedule cannot run.
        """
        num_ticks = 1 + max((tick for rank in ticks_of for tick in rank), default=-1)
        ticks = tuple(tuple(tuple(rank.get(tick, ())) for rank in ticks_of) for tick in range(num_ticks))
        return cls(
            name=name,
            num_ranks=len(ticks_of),
            num_chunks=num_chunks,
            placement=placement,
            num_microbatches=num_microbatches,
            ticks=ticks,
        )

    @classmethod
    def parse(
        cls, text: str, *, name: str, num_microbatches: int, num_chunks: int = 1, placement: Placement = LOOP
    ) -> "Schedule":
        """Parse a schedule printed by `str()`; see `grid.py` for the form.

        Raises:
            ScheduleError: a cell is not an action, the lines differ in length, or the schedule cannot run.
        """
        grid = parse_grid(text)
        return cls(
            name=name,
            num_ranks=len(grid),
            num_chunks=num_chunks,
            placement=placement,
            num_microbatches=num_microbatches,
            ticks=tuple(zip(*grid, strict=True)),
        )

    def __str__(self) -> str:
        return "\n".join(draw_grid(self.ticks, num_ranks=self.num_ranks))

    def _repr_html_(self) -> str:
        """Return the picture of the schedule as HTML, which a notebook shows."""
        # `picture.py` imports this file, so it is reached through the room, when a notebook shows a schedule.
        from . import draw_picture

        sizes = f"{self.num_ranks} ranks, {self.num_microbatches} microbatches"
        return picture_html(draw_picture(self, format="svg"), format="svg", alt=f"{self.name}: {sizes}")
