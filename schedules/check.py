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

Number = tuple[int, Kind, int]
"""Stage, kind and microbatch of an action."""


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
    # By numbers, since a schedule has thousands of actions, and a search hundreds of schedules.
    by_number = {(action.stage, action.kind, action.microbatch): place for action, place in places.items()}
    kinds: tuple[Kind, ...] = ("F", "I", "W") if is_split else ("F", "B")
    for stage in range(schedule.num_stages):
        needed = {
            kind: needed_kinds(stage, kind, num_stages=schedule.num_stages, has_halves=is_split) for kind in kinds
        }
        for microbatch in range(schedule.num_microbatches):
            for kind in kinds:
                _check_needs(schedule, (stage, kind, microbatch), needed[kind], by_number)


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
    needed = needed_kinds(action.stage, action.kind, num_stages=num_stages, has_halves=has_halves)
    return [Action(stage=stage, kind=kind, microbatch=action.microbatch) for stage, kind in needed]


def needed_kinds(stage: int, kind: Kind, *, num_stages: int, has_halves: bool) -> tuple[tuple[int, Kind], ...]:
    """Return stage and kind of the actions of a microbatch that must finish before one of it."""
    if kind == "F":
        return ((stage - 1, "F"),) if stage else ()
    if kind == "W":
        return ((stage, "I"),)
    is_last = stage == num_stages - 1
    return ((stage, "F"),) if is_last else ((stage, "F"), (stage + 1, "I" if has_halves else "B"))


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


def _check_needs(
    schedule: Unchecked, number: Number, needed: tuple[tuple[int, Kind], ...], places: dict[Number, Place]
) -> None:
    place, microbatch = places.get(number), number[2]
    if place is None:
        _fail_missing(schedule, number)
    tick, rank, position = place
    for stage, kind in needed:
        before = places.get((stage, kind, microbatch))
        if before is None:
            _fail_missing(schedule, (stage, kind, microbatch))
        # Between ranks a result is sent at the end of a tick; on one rank the order within the cell decides.
        is_met = before[0] < tick or (before[1] == rank and before[0] == tick and before[2] < position)
        if not is_met:
            missed = _action_of((stage, kind, microbatch))
            _fail(schedule, place, f"runs {_action_of(number)} at tick {tick}, before {missed} has finished.")


def _action_of(number: Number) -> Action:
    stage, kind, microbatch = number
    return Action(stage=stage, kind=kind, microbatch=microbatch)


def _fail(schedule: Unchecked, place: Place, what: str) -> NoReturn:
    tick, rank, _ = place
    lines = _draw_until(schedule, tick)
    lines[rank] += "  <-- here"
    raise ScheduleError(f"schedule {schedule.name!r}: rank {rank} {what}\n" + "\n".join(lines))


def _fail_missing(schedule: Unchecked, number: Number) -> NoReturn:
    action = _action_of(number)
    lines = _draw_until(schedule, len(schedule.ticks) - 1)
    raise ScheduleError(f"schedule {schedule.name!r} never runs {action}.\n" + "\n".join(lines))


def _draw_until(schedule: Unchecked, tick: int) -> list[str]:
    """Return the grid's last ticks up to this one, so that an arrow at the end of a line points at its cell."""
    shown = schedule.ticks[max(0, tick + 1 - _TICKS_SHOWN) : tick + 1]
    return [f"  {line}" for line in draw_grid(shown, num_ranks=schedule.num_ranks)]
