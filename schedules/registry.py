"""The schedules by name, and how one is built. `SCHEDULES` is the only registry of the project."""

from collections.abc import Sequence
from typing import Any, get_args

from ..meshes.arguments import check_choice
from ..meshes.errors import ScheduleError, suggest
from .check import check_sizes
from .families.auto import AUTO
from .families.fixed import FIXED
from .family import Family
from .schedule import Schedule
from .simulate import Clock
from .stage_cost import StageCost
from .vocab import Vocab, check_vocab

SCHEDULES: dict[str, Family] = {family.name: family for family in (*FIXED, AUTO)}
"""Name -> family of schedules."""


def find_family(name: str) -> Family:
    """Return the family of a name.

    Raises:
        ScheduleError: the name is unknown; the message suggests the nearest.
    """
    if not isinstance(name, str) or name not in SCHEDULES:
        near = suggest(str(name), SCHEDULES)
        raise ScheduleError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}.{near}")
    return SCHEDULES[name]


def build_schedule(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    num_chunks: int = 1,
    clock: Clock = "lockstep",
    max_in_flight: int | None = None,
    vocab: Vocab = "ends",
    stages: Sequence[StageCost] | None = None,
) -> Schedule:
    """Build a schedule by name; the options that its family does not take have no influence.

    >>> build_schedule("gpipe", num_ranks=2, num_microbatches=2).num_ticks
    6

    Args:
        num_chunks: chunks of layers per rank, 2 or more for interleaved schedules.
        clock: order for one lockstep program (what trellax runs), or for separate programs, which for 1F1B holds fewer
            microbatches.
        max_in_flight: limit of microbatches on a rank for `auto`; None is no limit.
        vocab: placement of embedding and head, as given to `split_transformer`.
        stages: times of the stages for `auto`; None stands for equal stages.

    Raises:
        ScheduleError: the name is unknown, a count is below 1, or the schedule cannot have this number of chunks or a
            limit.
    """
    family = find_family(name)
    check_vocab(vocab)
    check_choice("clock", clock, get_args(Clock), error=ScheduleError)
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "num_chunks": num_chunks}
    check_sizes(**sizes)
    family.check_chunks(num_chunks)
    family.check_limit(max_in_flight)
    options: dict[str, Any] = {"clock": clock, "vocab": vocab, "max_in_flight": max_in_flight, "stages": stages}
    return family(**family.accepted({**sizes, **options}))
