"""Ways to break a schedule on purpose, each at one action of one kind: sixty mistakes that `check` must catch.

A mutation changes the cells in place, or gives up by `assume` where the action cannot be broken that way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

from hypothesis import assume
from trellax.schedules import Action, Kind, Schedule
from trellax.schedules.check import needs

ANY_KIND: tuple[Kind, ...] = ("F", "B", "I", "W")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid that can be changed, [tick][rank][position], and the action in it to break."""

    like: Schedule
    cells: list[list[list[Action]]]
    tick: int
    rank: int
    position: int

    @property
    def cell(self) -> list[Action]:
        return self.cells[self.tick][self.rank]

    @property
    def action(self) -> Action:
        return self.cell[self.position]

    def needed(self) -> list[Action]:
        has_halves = self.action.kind in ("I", "W")
        return needs(self.action, num_stages=self.like.num_stages, has_halves=has_halves)

    def cell_of(self, action: Action) -> list[Action]:
        return next(cell for row in self.cells for cell in row if action in cell)

    def tick_of(self, action: Action) -> int:
        return next(tick for tick, row in enumerate(self.cells) if any(action in cell for cell in row))

    def add_tick(self, tick: int, action: Action) -> None:
        self.cells.insert(tick, [[] for _ in self.cells[0]])
        self.cells[tick][self.rank].append(action)


Mutation = Callable[[Grid], None]


def drop(grid: Grid) -> None:
    grid.cell.remove(grid.action)


def duplicate_later(grid: Grid) -> None:
    grid.add_tick(len(grid.cells), grid.action)


def duplicate_in_place(grid: Grid) -> None:
    grid.cell.insert(grid.position, grid.action)


def move_to_next_stage(grid: Grid) -> None:
    grid.cell[grid.position] = replace(grid.action, stage=grid.action.stage + 1)


def move_to_another_chunk(grid: Grid) -> None:
    assume(grid.like.num_chunks > 1)
    stage = (grid.action.stage + grid.like.num_ranks) % grid.like.num_stages
    grid.cell[grid.position] = replace(grid.action, stage=stage)


def move_beyond_the_last_stage(grid: Grid) -> None:
    grid.cell[grid.position] = replace(grid.action, stage=grid.like.num_stages + grid.rank)


def move_to_next_rank(grid: Grid) -> None:
    assume(grid.like.num_ranks > 1)
    grid.cells[grid.tick][(grid.rank + 1) % grid.like.num_ranks].append(grid.cell.pop(grid.position))


def rename_to_another_kind(grid: Grid) -> None:
    kind: dict[Kind, Kind] = {"F": "B", "B": "F", "I": "W", "W": "I"}
    grid.cell[grid.position] = replace(grid.action, kind=kind[grid.action.kind])


def rename_to_next_microbatch(grid: Grid) -> None:
    grid.cell[grid.position] = replace(grid.action, microbatch=grid.action.microbatch + 1)


def rename_to_a_negative_microbatch(grid: Grid) -> None:
    grid.cell[grid.position] = replace(grid.action, microbatch=-1)


def swap_with_what_it_needs(grid: Grid) -> None:
    assume(bool(grid.needed()))
    action, source = grid.action, grid.needed()[0]
    for cell in (cell for row in grid.cells for cell in row):
        cell[:] = [{action: source, source: action}.get(here, here) for here in cell]


def run_beside_what_it_needs(grid: Grid) -> None:
    """A result travels at the end of a tick, and within a cell order counts: what it came from cannot run so late."""
    assume(bool(grid.needed()))
    action, source = grid.action, grid.needed()[-1]
    tick = grid.tick_of(source)
    grid.cell.remove(action)
    grid.cells[tick][grid.rank].insert(0, action)


def run_first_of_all(grid: Grid) -> None:
    assume(bool(grid.needed()))
    action = grid.cell.pop(grid.position)
    grid.add_tick(0, action)


def join_two_of_a_kind(grid: Grid) -> None:
    """The next action of this kind comes into the same cell."""
    kind = grid.action.kind
    later = [cell for row in grid.cells[grid.tick + 1 :] for cell in [row[grid.rank]] if kind in {a.kind for a in cell}]
    assume(bool(later))
    moved = next(other for other in later[0] if other.kind == kind)
    later[0].remove(moved)
    grid.cell.append(moved)


def add_a_negative_stage(grid: Grid) -> None:
    grid.cells[grid.tick][-1].append(replace(grid.action, stage=-1))


def lose_a_rank(grid: Grid) -> None:
    del grid.cells[grid.tick][grid.rank]


def split_this_backward_alone(grid: Grid) -> None:
    assume(grid.like.num_stages * grid.like.num_microbatches > 1)
    halves = [replace(grid.action, kind="I"), replace(grid.action, kind="W")]
    grid.cell[grid.position : grid.position + 1] = halves


def join_these_halves_alone(grid: Grid) -> None:
    assume(grid.like.num_stages * grid.like.num_microbatches > 1)
    weight = replace(grid.action, kind="W")
    grid.cell[grid.position] = replace(grid.action, kind="B")
    grid.cell_of(weight).remove(weight)


def add_a_whole_backward(grid: Grid) -> None:
    grid.add_tick(len(grid.cells), replace(grid.action, kind="B"))


def forget_every_weight_gradient(grid: Grid) -> None:
    for cell in (cell for row in grid.cells for cell in row):
        cell[:] = [action for action in cell if action.kind != "W"]


_EVERY_KIND = (
    drop,
    duplicate_later,
    duplicate_in_place,
    move_to_next_stage,
    move_to_another_chunk,
    move_beyond_the_last_stage,
    move_to_next_rank,
    rename_to_another_kind,
    rename_to_next_microbatch,
    rename_to_a_negative_microbatch,
    swap_with_what_it_needs,
    run_beside_what_it_needs,
    run_first_of_all,
    join_two_of_a_kind,
)

MUTATIONS: tuple[tuple[Mutation, Kind], ...] = (
    *product(_EVERY_KIND, ANY_KIND),
    (add_a_negative_stage, "F"),
    (lose_a_rank, "F"),
    (split_this_backward_alone, "B"),
    (join_these_halves_alone, "I"),
    (add_a_whole_backward, "W"),
    (forget_every_weight_gradient, "W"),
)
"""A mutation and the kind of action it is tried on."""
