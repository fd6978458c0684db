"""The words of `trellax schedule`, and the checks of them that need no schedule. Read `schedule.py` next."""

import argparse
import math
from typing import get_args

from ..meshes.errors import ScheduleError, suggest
from ..meshes.numbers import real_number
from ..pipeline.schedules import SCHEDULES, Clock
from .argument_types import number, path, whole

COSTS = ("forward", "input_grad", "weight_grad", "transfer")
"""Options that are times, by the name they have in `simulate`."""

_CLOCKS = get_args(Clock)
_SMALLEST, _LARGEST = 1e-100, 1e100
_MOST_RANKS = 256
_MOST_CELLS = 20_000
_WRITERS = (("png", "a picture"), ("svg", "a picture"), ("csv", "the schedule"), ("trace", "a trace for Perfetto"))


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Teach a parser the words of `trellax schedule`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    parser.add_argument(
        "--file", type=path, metavar="CSV", help="a schedule of your own: a row a rank, cells such as 2F0"
    )
    parser.add_argument("--compare", action="store_true", help="a table of all schedules")
    parser.add_argument("--ranks", type=whole, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=whole, metavar="M", help="microbatches in a step")
    parser.add_argument("--chunks", type=whole, metavar="V", help="chunks a rank, if interleaved (default 2)")
    parser.add_argument("--forward", type=number, default=1.0, metavar="F", help="time of a rank's forward (default 1)")
    parser.add_argument("--input-grad", type=number, default=1.0, metavar="I", help="of its input gradient (default 1)")
    parser.add_argument(
        "--weight-grad", type=number, default=1.0, metavar="W", help="of its weight gradient (default 1)"
    )
    parser.add_argument("--transfer", type=number, default=0.0, metavar="T", help="of a hop to a neighbour (default 0)")
    parser.add_argument(
        "--layers", metavar="N,N,...", help="size of every stage, such as 8,8,8,6; times above are of a mean rank"
    )
    parser.add_argument("--max-in-flight", type=whole, metavar="N", help="microbatches a rank may hold, for auto")
    parser.add_argument(
        "--clock",
        metavar="|".join(_CLOCKS),
        default="lockstep",
        help="lockstep: one program for all ranks, as trellax runs it (default); async: a program for every rank",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    for suffix, what in _WRITERS:
        parser.add_argument(f"--{suffix}", metavar="FILE", help=f"write {what}")


def check_schedule_arguments(args: argparse.Namespace) -> None:
    """Raise unless what was asked fits together, as far as the words alone can tell.

    Raises:
        ScheduleError: the first mistake.
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
    for name in COSTS:
        value, least = getattr(args, name), "0 or more" if name == "transfer" else "above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "transfer"):
            raise ScheduleError(f"--{name.replace('_', '-')} is {value:g}; a time is {least}.")
        if value and not _SMALLEST <= value <= _LARGEST:
            raise ScheduleError(
                f"--{name.replace('_', '-')} is {value:g}, and a time is {_SMALLEST:g} to {_LARGEST:g}: sums of others "
                "would overflow or vanish.",
                fix="give all times in a larger or smaller unit.",
            )
    _check_layers(args)
    options = [*(option for option, _ in _WRITERS), "layers"]
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
    if args.ranks > _MOST_RANKS or cells > _MOST_CELLS:
        raise ScheduleError(
            f"{args.ranks} ranks and {cells:,} ranks x chunks x microbatches are too many to look at; "
            f"{_MOST_RANKS} and {_MOST_CELLS:,} are the most.",
            fix="ask for fewer microbatches: the pattern repeats.",
        )


def _check_layers(args: argparse.Namespace) -> None:
    if args.layers is None:
        return
    try:
        layers = read_layers(args.layers)
    except ValueError:
        layers = (math.nan,)
    if not all(_SMALLEST <= size <= _LARGEST for size in layers):
        raise ScheduleError(
            f"--layers is {args.layers!r}; it takes the size of every stage, numbers above 0 with commas between, "
            f"{_SMALLEST:g} to {_LARGEST:g}.",
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
    """Return the numbers of `--layers`.

    Raises:
        ValueError: a word is no number.
    """
    return tuple(real_number(word) for word in text.split(","))
