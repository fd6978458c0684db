"""Check that a schedule can run: every action exactly once, on its rank, after the actions that it needs.

Every schedule is checked when it is made: published ones have had errors of order that nobody noticed for a year.
"""

from dataclasses import dataclass
from typing import NoReturn

from ..meshes.arguments import check_count
from ..meshes.errors import ScheduleError
from .action import Action, Kind
from .grid import Ticks, draw_grid
from .placement import Placement

_TICKS_SHOWN = 8

Place = tuple[int, int, int]
"""Tick, rank and position within the cell."""


@dataclass(frozen=True, kw_only=True)
class Unchecked:
    """The fields of a schedule before the check."""

    name: str
    num_ranks: int
    num_microbatches: int
    num_chunks: int
    placement: Placement
    ticks: Ticks

    @property
    def num_stages(self) -> int:
        """Number of stages, num_ranks x num_chunks."""
        return self.num_ranks * self.num_chunks


def check_actions(schedule: Unchecked) -> None:
    """Raise unless the schedule is complete and every dependency is met.

    Raises:
        ScheduleError: a rule is broken; the message names the rule and shows the grid with an arrow on the cell.
    """
    # First everything that is there, then everything that should be: a missing action has no place to point at.
    places = _place_actions(schedule)
    is_split = any(action.kind in ("I", "W") for action in places)
    stray = next((action for action in places if is_split and action.kind == "B"), None)
    if stray:
        _fail(schedule, places[stray], f"runs {stray}, but other backwards are in halves; split all or none.")
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in ("F", "I", "W") if is_split else ("F", "B"):
                _check_needs(schedule, Action(stage=stage, kind=kind, microbatch=microbatch), places)


def check_sizes(*, num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> None:
    """Raise unless the sizes of a schedule are integers of 1 or more; builders call it before they use them.

    Raises:
        ScheduleError: a size is not.
    """
    check_count("num_ranks", num_ranks, error=ScheduleError)
    check_count("num_microbatches", num_microbatches, error=ScheduleError)
    check_count("num_chunks", num_chunks, error=ScheduleError)


def needs(action: Action, *, num_stages: int, has_halves: bool) -> list[Action]:
    """Return the actions that must finish before this one.

    The forward of stage s needs that of stage s - 1. A backward needs the forward of its stage and the backward (its
    input gradient, if backwards are split) of stage s + 1. A weight gradient needs the input gradient of its stage.
    """

    def other(stage: int, kind: Kind) -> Action:
        return Action(stage=stage, kind=kind, microbatch=action.microbatch)

    if action.kind == "F":
        return [other(action.stage - 1, "F")] if action.stage else []
    if action.kind == "W":
        return [other(action.stage, "I")]
    is_last = action.stage == num_stages - 1
    return [other(action.stage, "F")] + ([] if is_last else [other(action.stage + 1, "I" if has_halves else "B")])


def _place_actions(schedule: Unchecked) -> dict[Action, Place]:
    """Return the place of every action; refuses unknown and repeated ones."""
    places: dict[Action, Place] = {}
    for tick, cells in enumerate(schedule.ticks):
        if len(cells) != schedule.num_ranks:
            raise ScheduleError(f"tick {tick} has {len(cells)} cells for {schedule.num_ranks} ranks.")
        for rank, cell in enumerate(cells):
            for position, action in enumerate(cell):
                place = (tick, rank, position)
                _check_place(schedule, action, place)
                if action in places:
                    _fail(schedule, place, f"runs {action} a second time; the first is at tick {places[action][0]}.")
                places[action] = place
    return places


def _check_place(schedule: Unchecked, action: Action, place: Place) -> None:
    if not 0 <= action.stage < schedule.num_stages:
        _fail(schedule, place, f"runs {action}, but the stages are 0 to {schedule.num_stages - 1}.")
    if not 0 <= action.microbatch < schedule.num_microbatches:
        _fail(schedule, place, f"runs {action}, but the microbatches are 0 to {schedule.num_microbatches - 1}.")
    home = schedule.placement.rank_of(action.stage)
    if home != place[1]:
        _fail(schedule, place, f"runs {action}, but stage {action.stage} lives on rank {home}.")
    before = schedule.ticks[place[0]][place[1]][: place[2]]
    if any(other.kind == action.kind for other in before):
        _fail(schedule, place, f"runs {action} after another {action.kind} in one tick; a tick holds one of each kind.")


def _check_needs(schedule: Unchecked, action: Action, places: dict[Action, Place]) -> None:
    if action not in places:
        _fail_missing(schedule, action)
    tick, rank, position = places[action]
    is_split = action.kind in ("I", "W")
    for needed in needs(action, num_stages=schedule.num_stages, has_halves=is_split):
        if needed not in places:
            _fail_missing(schedule, needed)
        needed_tick, needed_rank, needed_position = places[needed]
        # Between ranks a result is sent at the end of a tick; on one rank the order within the cell decides.
        is_met = needed_tick < tick or (needed_rank == rank and needed_tick == tick and needed_position < position)
        if not is_met:
            _fail(schedule, places[action], f"runs {action} at tick {tick}, before {needed} has finished.")


def _fail(schedule: Unchecked, place: Place, what: str) -> NoReturn:
    tick, rank, _ = place
    lines = _draw_until(schedule, tick)
    lines[rank] += "  <-- here"
    raise ScheduleError(f"schedule {schedule.name!r}: rank {rank} {what}\n" + "\n".join(lines))


def _fail_missing(schedule: Unchecked, action: Action) -> NoReturn:
    lines = _draw_until(schedule, len(schedule.ticks) - 1)
    raise ScheduleError(f"schedule {schedule.name!r} never runs {action}.\n" + "\n".join(lines))


def _draw_until(schedule: Unchecked, tick: int) -> list[str]:
    """Return the grid's last ticks up to this one, so that an arrow at the end of a line points at its cell."""
    shown = schedule.ticks[max(0, tick + 1 - _TICKS_SHOWN) : tick + 1]
    return [f"  {line}" for line in draw_grid(shown, num_ranks=schedule.num_ranks)]
