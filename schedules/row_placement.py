"""Find the placement of stages that the rows of a file have: a loop, a V, or any that keeps neighbours together.

    0F0,... 4F0      a loop: stages 0 and 4 in row 1      0F0,... 7F0      a V: stages 0 and 7 in row 1
    1F0,... 5F0                                           1F0,... 6F0
    2F0,... 6F0                                           2F0,... 5F0
    3F0,... 7F0                                           3F0,... 4F0

A misplaced action is reported against the shape that fits the file best. Read `csv_format.py` next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..meshes.errors import ScheduleError
from .action import Action
from .placement import Placement, Shape, rank_in


@dataclass(frozen=True, kw_only=True)
class Home:
    """The rank of every stage, by a shape or by a mapping; it knows no number of stages, which a file may get wrong."""

    num_ranks: int
    shape: Shape = "loop"
    ranks: Mapping[int, int] = field(default_factory=dict)

    def rank_of(self, stage: int) -> int:
        """Return the rank of a stage."""
        return self.ranks[stage] if self.ranks else rank_in(self.shape, stage, num_ranks=self.num_ranks)

    def check(self, action: Action, rank: int, *, place: str) -> None:
        """Raise unless an action is in the row of its stage's rank.

        Raises:
            ScheduleError: it is not; the message names `place`.
        """
        home = self.rank_of(action.stage)
        if home == rank:
            return
        rows = f"with {self.num_ranks} rows" + (" in a V" if self.shape == "v" else "")
        raise ScheduleError(
            f"{place}: {action} is in the row of rank {rank}, but {rows} stage {action.stage} lives on rank {home}.",
            fix=f"move it to row {home + 1}"
            + (f"; stage s is in row s % {self.num_ranks} + 1." if self.shape == "loop" else "."),
        )

    def placement(self, num_chunks: int) -> Placement:
        """Return the placement of this many chunks."""
        if self.ranks:
            return Placement(tuple(self.ranks[stage] for stage in range(len(self.ranks))))
        return Placement.of(self.shape, num_ranks=self.num_ranks, num_chunks=num_chunks)


def find_home(cells: Sequence[tuple[int, Action]], *, num_ranks: int, name: str) -> Home:
    """Return the ranks of stages by which every action is in its row, or else the shape that misplaces fewest.

    Args:
        cells: rank and action of every action.

    Raises:
        ScheduleError: every stage is in one row, but neighbouring stages are on ranks that are none.
    """
    shapes: tuple[Shape, ...] = ("loop", "v")
    homes = [Home(num_ranks=num_ranks, shape=shape) for shape in shapes]
    misplaced = [sum(home.rank_of(action.stage) != rank for rank, action in cells) for home in homes]
    best = homes[misplaced.index(min(misplaced))]
    ranks = dict(sorted((action.stage, rank) for rank, action in cells))
    is_one_row_each = all(ranks[action.stage] == rank for rank, action in cells)
    is_whole = list(ranks) == list(range(len(ranks))) and len(ranks) % num_ranks == 0
    if not min(misplaced) or not is_one_row_each or not is_whole:
        return best
    home = Home(num_ranks=num_ranks, ranks=ranks)
    try:
        home.placement(len(ranks) // num_ranks)
    except ScheduleError as error:
        raise ScheduleError(f"{name}: {error.problem}", fix=error.fix or "") from error
    return home
