"""The proof that a schedule can run: every action exactly once, on its rank, after what it needs.

Published schedules have been wrong for a year at a time, so every schedule is checked whenever one is made.
"""

from typing import TYPE_CHECKING, NoReturn

from ...meshes.arguments import check_count
from ...meshes.errors import ScheduleError
from .action import Action, Kind

if TYPE_CHECKING:
    from .grid import Schedule

Place = tuple[int, int, int]
"""Tick, rank and position within the cell."""


def check_actions(schedule: "Schedule") -> None:
    """Raise unless the schedule is complete and every dependency is met.

    Raises:
        ScheduleError: with the rule, and the grid with an arrow on the cell.
    """
    check_sizes(
        num_ranks=schedule.num_ranks, num_microbatches=schedule.num_microbatches, num_chunks=schedule.num_chunks
    )
    places = _place_once(schedule)
    has_halves = any(action.kind in ("I", "W") for action in places)
    stray = next((action for action in places if has_halves and action.kind == "B"), None)
    if stray:
        _fail(schedule, places[stray], f"runs {stray}, but other backwards are in halves; split all or none.")
    for stage in range(schedule.num_stages):
        for microbatch in range(schedule.num_microbatches):
            for kind in ("F", "I", "W") if has_halves else ("F", "B"):
                _check_action(schedule, Action(stage=stage, kind=kind, microbatch=microbatch), places)


def check_sizes(*, num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> None:
    """Raise unless the sizes of a schedule are whole numbers, 1 or more; builders call it before they count with them.

    Raises:
        ScheduleError: with the size that is none.
    """
    check_count("num_ranks", num_ranks, error=ScheduleError)
    check_count("num_microbatches", num_microbatches, error=ScheduleError)
    check_count("num_chunks", num_chunks, error=ScheduleError)


def _place_once(schedule: "Schedule") -> dict[Action, Place]:
    places: dict[Action, Place] = {}
    for tick, cells in enumerate(schedule.ticks):
        if len(cells) != schedule.num_ranks:
            raise ScheduleError(f"tick {tick} has {len(cells)} cells for {schedule.num_ranks} ranks.")
        for rank, cell in enumerate(cells):
            for position, action in enumerate(cell):
                place = (tick, rank, position)
                _check_known(schedule, action, place)
                if action in places:
                    _fail(schedule, place, f"runs {action} a second time; the first is at tick {places[action][0]}.")
                places[action] = place
    return places


def _check_known(schedule: "Schedule", action: Action, place: Place) -> None:
    if not 0 <= action.stage < schedule.num_stages:
        _fail(schedule, place, f"runs {action}, but the stages are 0 to {schedule.num_stages - 1}.")
    if not 0 <= action.microbatch < schedule.num_microbatches:
        _fail(schedule, place, f"runs {action}, but the microbatches are 0 to {schedule.num_microbatches - 1}.")
    home = action.stage % schedule.num_ranks
    if home != place[1]:
        _fail(schedule, place, f"runs {action}, but stage {action.stage} lives on rank {home}.")
    before = schedule.ticks[place[0]][place[1]][: place[2]]
    if any(other.kind == action.kind for other in before):
        _fail(schedule, place, f"runs {action} after another {action.kind} in one tick; a tick holds one of each kind.")


def _check_action(schedule: "Schedule", action: Action, places: dict[Action, Place]) -> None:
    if action not in places:
        raise ScheduleError(f"schedule {schedule.name!r} never runs {action}.\n{_draw(schedule, None)}")
    here = places[action]
    halves = action.kind in ("I", "W")
    for needed in needs(action, num_stages=schedule.num_stages, has_halves=halves):
        if needed not in places:
            raise ScheduleError(f"schedule {schedule.name!r} never runs {needed}.\n{_draw(schedule, None)}")
        there = places[needed]
        # Between ranks a result travels at the end of a tick; on one rank the order within the cell counts.
        is_met = (there[0], there[2]) < (here[0], here[2]) if there[1] == here[1] else there[0] < here[0]
        if not is_met:
            _fail(schedule, here, f"runs {action} at tick {here[0]}, before {needed} has finished.")


def needs(action: Action, *, num_stages: int, has_halves: bool) -> list[Action]:
    """Return the actions that must have finished before this one, among those of a schedule with that many stages."""

    def other(stage: int, kind: Kind) -> Action:
        return Action(stage=stage, kind=kind, microbatch=action.microbatch)

    if action.kind == "F":
        return [other(action.stage - 1, "F")] if action.stage else []
    if action.kind == "W":
        return [other(action.stage, "I")]
    is_last = action.stage == num_stages - 1
    return [other(action.stage, "F")] + ([] if is_last else [other(action.stage + 1, "I" if has_halves else "B")])


def _fail(schedule: "Schedule", place: Place, what: str) -> NoReturn:
    raise ScheduleError(f"schedule {schedule.name!r}: rank {place[1]} {what}\n{_draw(schedule, place)}")


def _draw(schedule: "Schedule", place: Place | None) -> str:
    """The grid up to the cell, which ends its line, so that the arrow points at it; eight ticks at most."""
    last = place[0] if place else schedule.num_ticks - 1
    ticks = range(max(0, last - 7), last + 1)
    words = [["+".join(map(str, schedule.ticks[t][r])) or "." for t in ticks] for r in range(schedule.num_ranks)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    lines = [
        f"  rank {rank} | " + " ".join(w.rjust(n) for w, n in zip(line, widths, strict=True))
        for rank, line in enumerate(words)
    ]
    if place:
        lines[place[1]] += "  <-- here"
    return "\n".join(lines)
