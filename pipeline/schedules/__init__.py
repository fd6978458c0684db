"""Pipeline schedules as data: no jax here. `SCHEDULES` is the one registry of the project."""

from collections.abc import Callable

from ...meshes.errors import ScheduleError, suggest
from .action import Action, Kind
from .gpipe import gpipe
from .grid import Schedule
from .naive import naive
from .one_f_one_b import one_f_one_b
from .simulate import Timing, simulate

SCHEDULES: dict[str, Callable[..., Schedule]] = {"naive": naive, "gpipe": gpipe, "1f1b": one_f_one_b}
"""Name -> builder taking `num_ranks` and `num_microbatches`."""


def build_schedule(name: str, *, num_ranks: int, num_microbatches: int) -> Schedule:
    """Return the named schedule.

    >>> build_schedule("gpipe", num_ranks=2, num_microbatches=2).num_ticks
    6

    Raises:
        ScheduleError: the name is unknown, or a count is below 1.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}.{suggest(name, SCHEDULES)}")
    return SCHEDULES[name](num_ranks=num_ranks, num_microbatches=num_microbatches)


__all__ = [
    "SCHEDULES",
    "Action",
    "Kind",
    "Schedule",
    "Timing",
    "build_schedule",
    "gpipe",
    "naive",
    "one_f_one_b",
    "simulate",
]
