"""Pipeline schedules as data: no jax here. `SCHEDULES` is the one registry of the project."""

from collections.abc import Callable, Sequence
from typing import Any, get_args

from ...meshes.arguments import check_choice
from ...meshes.errors import ScheduleError, suggest
from .action import Action, Kind
from .auto import auto
from .check import check_sizes
from .draw import draw_picture
from .formula import Formula, explain_difference, find_formula
from .gpipe import gpipe
from .grid import Schedule
from .interleaved import interleaved_1f1b
from .interleaved_zero_bubble import interleaved_zb_h1
from .naive import naive
from .one_f_one_b import one_f_one_b
from .place import Vocab, check_vocab, schedule_from_orders
from .simulate import Clock, Span, Timing, count_messages, simulate, time_actions
from .stage_cost import StageCost
from .table import load_schedule, schedule_from_csv, schedule_to_csv
from .trace import trace_from_schedule
from .zero_bubble import zb_h1

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved-1f1b": interleaved_1f1b,
    "zb-h1": zb_h1,
    "interleaved-zb-h1": interleaved_zb_h1,
    "auto": auto,
}
"""Name -> builder taking `num_ranks`, `num_microbatches` and, where the name says interleaved, `num_chunks`."""


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
    """Return the named schedule; interleaved ones have `num_chunks` chunks a rank, 2 or more.

    >>> build_schedule("gpipe", num_ranks=2, num_microbatches=2).num_ticks
    6

    Args:
        clock: whom the order is for: one lockstep program (what trellax runs), or separate programs, which for 1F1B
            hold fewer microbatches.
        vocab: who works on embedding and head, as given to `split_transformer`.
        max_in_flight: limit of microbatches on a rank for `auto`; None is no limit.
        stages: times of the stages for `auto`, which takes them for equal if left out; no other order depends on them.

    Raises:
        ScheduleError: a name is unknown, a count is below 1, or the name does not fit the number of chunks or a limit.
    """
    _check_words(name, vocab, clock)
    sizes: dict[str, Any] = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    # The others put no backward of the last stage into the tick of its forward.
    ends: dict[str, Any] = {"vocab": vocab} if name in ("1f1b", "interleaved-1f1b", "zb-h1", "auto") else {}
    if name == "auto":
        return auto(**sizes, **ends, clock=clock, num_chunks=num_chunks, max_in_flight=max_in_flight, stages=stages)
    check_sizes(**sizes, num_chunks=num_chunks)
    _check_chunks(name, num_chunks)
    _check_limit(name, max_in_flight)
    if num_chunks > 1:
        return SCHEDULES[name](**sizes, **ends, num_chunks=num_chunks)
    return one_f_one_b(**sizes, **ends, clock=clock) if name == "1f1b" else SCHEDULES[name](**sizes, **ends)


def _check_words(name: str, vocab: Vocab, clock: Clock) -> None:
    if not isinstance(name, str) or name not in SCHEDULES:
        near = suggest(str(name), SCHEDULES)
        raise ScheduleError(f"unknown schedule {name!r}; there are {', '.join(SCHEDULES)}.{near}")
    check_vocab(vocab)
    check_choice("clock", clock, get_args(Clock), error=ScheduleError)


def _check_limit(name: str, max_in_flight: int | None) -> None:
    if max_in_flight is not None:
        raise ScheduleError(
            f"max_in_flight={max_in_flight} is for the schedule auto alone; {name} takes no limit.",
            fix="build 'auto', or leave max_in_flight out.",
        )


def _check_chunks(name: str, num_chunks: int) -> None:
    if name.startswith("interleaved") and num_chunks < 2:
        raise ScheduleError(
            f"schedule {name!r} with {num_chunks} chunks a rank has nothing to interleave.",
            fix=f"set 2 chunks or more, or use {name.removeprefix('interleaved-')!r}.",
        )
    if not name.startswith("interleaved") and num_chunks != 1:
        raise ScheduleError(
            f"schedule {name!r} has one chunk a rank, not {num_chunks}.", fix="set 1 chunk, or use an interleaved one."
        )


__all__ = [
    "SCHEDULES",
    "Action",
    "Clock",
    "Formula",
    "Kind",
    "Schedule",
    "Span",
    "StageCost",
    "Timing",
    "Vocab",
    "auto",
    "build_schedule",
    "count_messages",
    "draw_picture",
    "explain_difference",
    "find_formula",
    "gpipe",
    "interleaved_1f1b",
    "interleaved_zb_h1",
    "load_schedule",
    "naive",
    "one_f_one_b",
    "schedule_from_csv",
    "schedule_from_orders",
    "schedule_to_csv",
    "simulate",
    "time_actions",
    "trace_from_schedule",
    "zb_h1",
]
