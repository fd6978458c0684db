"""Declare the arguments of `trellax schedule`, and check what needs no schedule."""

import argparse
import math
from typing import get_args

from ...meshes.errors import ScheduleError, suggest
from ...meshes.numbers import real_number
from ...schedules import SCHEDULES, Clock
from .types import parse_path, parse_real, parse_whole

COSTS = ("forward", "input_grad", "weight_grad", "transfer")
"""The options that are times, by the parameter of `simulate`."""

_CLOCKS = get_args(Clock)
_MIN_COST, _MAX_COST = 1e-100, 1e100
_MAX_RANKS = 256
_MAX_CELLS = 20_000
_WRITERS = (
    ("png", "a picture (PNG)"),
    ("svg", "a picture (SVG)"),
    ("csv", "the schedule, as --file reads it"),
    ("trace", "a trace for Perfetto (JSON)"),
)


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    parser.add_argument(
        "--file", type=parse_path, metavar="CSV", help="a schedule of your own: a row for each rank, cells such as 2F0"
    )
    parser.add_argument("--compare", action="store_true", help="compare all schedules in a table")
    _add_size_arguments(parser)
    _add_time_arguments(parser)
    parser.add_argument("--messages", action="store_true", help="print what is sent in every tick, from rank to rank")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    for suffix, what in _WRITERS:
        parser.add_argument(f"--{suffix}", metavar="FILE", help=f"write {what}")


def _add_size_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=parse_whole, metavar="P", help="number of pipeline ranks")
    parser.add_argument("--microbatches", type=parse_whole, metavar="M", help="microbatches of a step")
    parser.add_argument(
        "--chunks", type=parse_whole, metavar="V", help="chunks of layers a rank where there are several (default 2)"
    )
    parser.add_argument(
        "--max-in-flight", type=parse_whole, metavar="N", help="most microbatches in flight on a rank, for auto"
    )


def _add_time_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--forward", type=parse_real, default=1.0, metavar="F", help="time of a rank's forward (default 1)"
    )
    parser.add_argument(
        "--input-grad", type=parse_real, default=1.0, metavar="I", help="time of its input gradient (default 1)"
    )
    parser.add_argument(
        "--weight-grad", type=parse_real, default=1.0, metavar="W", help="time of its weight gradient (default 1)"
    )
    parser.add_argument(
        "--transfer", type=parse_real, default=0.0, metavar="T", help="time of a transfer between ranks (default 0)"
    )
    parser.add_argument(
        "--layers", metavar="N,N,...", help="layers of every stage, such as 8,8,8,6; the times are of an average rank"
    )
    parser.add_argument(
        "--clock",
        metavar="|".join(_CLOCKS),
        default="lockstep",
        help="lockstep: one program for all ranks, as trellax runs it (default); async: one program a rank",
    )


def check_schedule_arguments(args: argparse.Namespace) -> None:
    """Check the arguments against each other, as far as that needs no schedule.

    Raises:
        ScheduleError: an argument is wrong; the first mistake is reported.
    """
    given = [
        word for word, is_given in (("NAME", args.name), ("--file", args.file), ("--compare", args.compare)) if is_given
    ]
    if len(given) != 1:
        raise ScheduleError(
            f"`trellax schedule` takes one of NAME, --file and --compare, not {' and '.join(given) or 'none'}.",
            fix="write `trellax schedule 1f1b --ranks 4 --microbatches 8`.",
        )
    if args.name and args.name not in SCHEDULES:
        raise ScheduleError(
            f"unknown schedule {args.name!r}; there are {', '.join(SCHEDULES)}.{suggest(args.name, SCHEDULES)}",
            fix="take one of these, or read one of your own with --file.",
        )
    if args.clock not in _CLOCKS:
        raise ScheduleError(
            f"--clock is {args.clock!r}; there are {' and '.join(_CLOCKS)}.{suggest(args.clock, _CLOCKS)}"
        )
    _check_sizes(args)
    _check_times(args)
    _check_layers(args)
    options = [*(option for option, _ in _WRITERS), "layers", "messages"]
    given = [f"--{option}" for option in options if getattr(args, option)]
    if args.compare and given:
        raise ScheduleError(f"--compare has nothing for {' and '.join(given)}.", fix="name one schedule.")
    _check_limit(args)


def _check_sizes(args: argparse.Namespace) -> None:
    sizes = {"ranks": args.ranks, "microbatches": args.microbatches, "chunks": args.chunks}
    given = [f"--{name}" for name, size in sizes.items() if size is not None]
    if args.file:
        if given:
            raise ScheduleError(
                f"a file says its own sizes, so --file takes no {' and '.join(given)}.", fix="leave it out."
            )
        return
    missing = [f"--{name}" for name in ("ranks", "microbatches") if sizes[name] is None]
    if missing:
        raise ScheduleError(f"a schedule needs {' and '.join(missing)}.", fix="add --ranks 4 --microbatches 8.")
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ScheduleError(f"--{name} is {size}; it must be 1 or more.")
    cells = args.ranks * args.microbatches * (args.chunks or 1)
    if args.ranks > _MAX_RANKS or cells > _MAX_CELLS:
        raise ScheduleError(
            f"{args.ranks} ranks and {cells:,} ranks x chunks x microbatches are too many to look at; "
            f"{_MAX_RANKS} and {_MAX_CELLS:,} are the most.",
            fix="ask for fewer microbatches: the pattern repeats.",
        )


def _check_times(args: argparse.Namespace) -> None:
    for name in COSTS:
        value, least = getattr(args, name), "0 or more" if name == "transfer" else "above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "transfer"):
            raise ScheduleError(f"--{name.replace('_', '-')} is {value:g}; a time is {least}.")
        if value and not _MIN_COST <= value <= _MAX_COST:
            raise ScheduleError(
                f"--{name.replace('_', '-')} is {value:g}, and a time is {_MIN_COST:g} to {_MAX_COST:g}: sums of "
                "others would overflow or vanish.",
                fix="give all times in a larger or smaller unit.",
            )


def _check_layers(args: argparse.Namespace) -> None:
    if args.layers is None:
        return
    try:
        layers = read_layers(args.layers)
    except ValueError:
        layers = (math.nan,)
    if not all(_MIN_COST <= size <= _MAX_COST for size in layers):
        raise ScheduleError(
            f"--layers is {args.layers!r}; it takes the size of every stage, numbers above 0 with commas between, "
            f"{_MIN_COST:g} to {_MAX_COST:g}.",
            fix="write --layers 8,8,8,6.",
        )


def _check_limit(args: argparse.Namespace) -> None:
    limit = args.max_in_flight
    if limit is None:
        return
    if not args.name or "max_in_flight" not in SCHEDULES[args.name].takes:
        what = args.name or ("--file" if args.file else "--compare")
        raise ScheduleError(
            f"--max-in-flight is for the schedule auto alone; {what} takes no limit.",
            fix=f"write auto --max-in-flight {limit}, or leave it out.",
        )
    if limit < 1:
        raise ScheduleError(f"--max-in-flight is {limit}; a rank holds at least 1 microbatch.")


def read_layers(text: str) -> tuple[float, ...]:
    """Parse `--layers`: numbers with commas between them.

    Raises:
        ValueError: a part is not a number.
    """
    return tuple(real_number(word) for word in text.split(","))
