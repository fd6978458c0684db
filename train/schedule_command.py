"""`trellax schedule`: one schedule drawn, saved or as numbers, or all of them in a table."""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from ..meshes.errors import ScheduleError, suggest
from ..pipeline.schedules import (
    SCHEDULES,
    Clock,
    Formula,
    Schedule,
    Timing,
    build_schedule,
    count_messages,
    draw_picture,
    explain_difference,
    find_formula,
    load_schedule,
    schedule_to_csv,
    simulate,
    trace_from_schedule,
)
from ..pipeline.schedules.draw import peak_text

_STYLES = {"F": "white on blue", "B": "black on green", "I": "black on cyan", "W": "black on yellow"}
_CLOCKS = get_args(Clock)
_MOST_RANKS = 256
_MOST_CELLS = 20_000
_COSTS = ("forward", "input_grad", "weight_grad", "transfer")


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Teach a parser the words of `trellax schedule`."""
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    parser.add_argument("--file", metavar="CSV", help="a schedule of your own: a row a rank, cells such as 2F0")
    parser.add_argument("--compare", action="store_true", help="a table of all schedules")
    parser.add_argument("--ranks", type=int, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, metavar="M", help="microbatches in a step")
    parser.add_argument("--chunks", type=int, metavar="V", help="chunks a rank, if interleaved (default 2)")
    parser.add_argument("--forward", type=float, default=1.0, metavar="F", help="time of a rank's forward (default 1)")
    parser.add_argument("--input-grad", type=float, default=1.0, metavar="I", help="of its input gradient (default 1)")
    parser.add_argument(
        "--weight-grad", type=float, default=1.0, metavar="W", help="of its weight gradient (default 1)"
    )
    parser.add_argument("--transfer", type=float, default=0.0, metavar="T", help="of a hop to a neighbour (default 0)")
    parser.add_argument(
        "--clock",
        metavar="|".join(_CLOCKS),
        default="lockstep",
        help="lockstep: one program for all ranks, as trellax runs it (default); async: a program for every rank",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    for suffix, what in (
        ("png", "a picture"),
        ("svg", "a picture"),
        ("csv", "the schedule"),
        ("trace", "a trace for Perfetto"),
    ):
        parser.add_argument(f"--{suffix}", metavar="FILE", help=f"write {what}")


def run_schedule(args: argparse.Namespace) -> int:
    """Do what was asked and return the exit code.

    Raises:
        ScheduleError: what was asked does not fit together, or a file cannot be read or written.
    """
    _check_arguments(args)
    if args.compare:
        _compare(args)
        return 0
    schedule = load_schedule(args.file) if args.file else _build(args.name, args, num_chunks=args.chunks)
    timing = simulate(schedule, clock=args.clock, **_costs(args))
    is_saved = _save(schedule, args)
    if args.json:
        print(json.dumps(_numbers(schedule, timing, args)))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    if not is_saved:
        console.print(_draw_grid(schedule, width=console.width if console.is_terminal else None))
    console.print(_describe(schedule, timing, args), markup=False)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
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
    for name in _COSTS:
        value, least = getattr(args, name), "0 or more" if name == "transfer" else "above 0"
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "transfer"):
            raise ScheduleError(f"--{name.replace('_', '-')} is {value:g}; a time is {least}.")
    written = [f"--{option}" for option in _WRITERS if getattr(args, option)]
    if args.compare and written:
        raise ScheduleError(f"--compare has nothing for {' and '.join(written)}.", fix="name one schedule.")


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


def _build(name: str, args: argparse.Namespace, *, num_chunks: int | None) -> Schedule:
    if name == "auto":
        sizes = {"num_ranks": args.ranks, "num_microbatches": args.microbatches, "num_chunks": num_chunks or 1}
        return SCHEDULES[name](**sizes, **_costs(args))
    return build_schedule(
        name,
        num_ranks=args.ranks,
        num_microbatches=args.microbatches,
        num_chunks=num_chunks or (2 if _is_interleaved(name) else 1),
        clock=args.clock,
    )


def _is_interleaved(name: str) -> bool:
    return name.startswith("interleaved")


def _costs(args: argparse.Namespace) -> dict[str, float]:
    return {name: getattr(args, name) for name in _COSTS}


def _find_formula(schedule: Schedule, args: argparse.Namespace) -> Formula | None:
    # A file may bear the name of a schedule of ours and be another.
    if args.file:
        return None
    return find_formula(schedule, forward=args.forward, input_grad=args.input_grad, weight_grad=args.weight_grad)


_WRITERS: dict[str, Callable[[Schedule, argparse.Namespace], bytes]] = {
    "png": lambda schedule, args: draw_picture(schedule, format="png", clock=args.clock, **_costs(args)),
    "svg": lambda schedule, args: draw_picture(schedule, format="svg", clock=args.clock, **_costs(args)),
    "csv": lambda schedule, _: schedule_to_csv(schedule).encode(),
    "trace": lambda schedule, args: trace_from_schedule(schedule, clock=args.clock, **_costs(args)).encode(),
}


def _save(schedule: Schedule, args: argparse.Namespace) -> bool:
    paths = {option: getattr(args, option) for option in _WRITERS if getattr(args, option)}
    for option, path in paths.items():
        content = _WRITERS[option](schedule, args)
        try:
            Path(path).write_bytes(content)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ScheduleError(
                f"--{option} {path} cannot be written: {why}.", fix="name a file in a folder that is there."
            ) from error
        print(f"wrote {path}", file=sys.stderr)
    return bool(paths)


def _numbers(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> dict[str, Any]:
    formula = _find_formula(schedule, args)
    return {
        "name": schedule.name,
        "ranks": schedule.num_ranks,
        "chunks": schedule.num_chunks,
        "microbatches": schedule.num_microbatches,
        "clock": timing.clock,
        "makespan": timing.makespan,
        "bubble_fraction": timing.bubble_fraction,
        "peak_in_flight": list(timing.peak_in_flight),
        "ticks": schedule.num_ticks,
        "formula_bubble_fraction": formula.bubble_fraction if formula else None,
    }


def _draw_grid(schedule: Schedule, *, width: int | None) -> Text:
    """The grid in colour, in as many blocks of whole ticks as the width asks for."""
    words = [["+".join(map(str, cells[rank])) or "." for cells in schedule.ticks] for rank in range(schedule.num_ranks)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    heads = [f"rank {rank}".ljust(len(f"rank {schedule.num_ranks - 1}")) + " |" for rank in range(schedule.num_ranks)]
    text = Text()
    for first, last in _split_blocks(widths, room=None if width is None else width - len(heads[0])):
        if first or last < len(widths):
            text.append(f"{chr(10) if first else ''}ticks {first} to {last - 1}\n", style="bold")
        for head, row in zip(heads, words, strict=True):
            text.append(head)
            for word, size in zip(row[first:last], widths[first:last], strict=True):
                text.append(" " * (1 + size - len(word)))
                _append_cell(text, word)
            text.append("\n")
    text.right_crop(1)
    return text


def _split_blocks(widths: list[int], *, room: int | None) -> list[tuple[int, int]]:
    blocks, first, used = [], 0, 0
    for tick, size in enumerate(widths):
        if room is not None and tick > first and used + size + 1 > room:
            blocks.append((first, tick))
            first, used = tick, 0
        used += size + 1
    return [*blocks, (first, len(widths))]


def _append_cell(text: Text, word: str) -> None:
    if word == ".":
        text.append(word, style="dim")
        return
    for number, part in enumerate(word.split("+")):
        text.append("+" if number else "")
        text.append(part, style=next(style for kind, style in _STYLES.items() if kind in part))


def _describe(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> str:
    chunks = f" x {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    size = f"{schedule.num_ranks} ranks{chunks}, {schedule.num_microbatches} microbatches"
    peaks = peak_text(timing.peak_in_flight)
    lines = [
        f"{schedule.name}: {size}, {timing.clock} clock",
        f"bubble {_percent(timing.bubble_fraction)} of the time, makespan {timing.makespan:g}, peak in flight {peaks}",
    ]
    formula = _find_formula(schedule, args)
    if formula:
        why = explain_difference(schedule, formula, timing, **_costs(args))
        lines.append(
            f"formula {formula.bubble_fraction:.1%} = {formula.text} ({formula.source})"
            + (f": {why}" if why else ", as simulated")
        )
    return "\n".join(lines)


def _compare(args: argparse.Namespace) -> None:
    rows = [_compare_one(name, args) for name in SCHEDULES if not (_is_interleaved(name) and args.chunks == 1)]
    if args.json:
        print(json.dumps(rows))
        return
    head = ("schedule", "chunks", "bubble", "formula", "makespan", "peak in flight", "messages")
    body = [
        (
            str(row["name"]),
            str(row["chunks"]),
            _percent(row["bubble_fraction"]),
            _percent(row["formula_bubble_fraction"]),
            f"{row['makespan']:g}",
            str(max(row["peak_in_flight"])),
            str(row["messages"]),
        )
        for row in rows
    ]
    print(f"{args.ranks} ranks, {args.microbatches} microbatches, {args.clock} clock")
    print(_align([head, *body]))
    if any(row["chunks"] > 1 for row in rows):
        print("In flight are microbatches of one chunk: with V chunks a rank, each holds 1/V of the rank's layers.")


def _compare_one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    schedule = _build(name, args, num_chunks=args.chunks if _is_interleaved(name) or name == "auto" else 1)
    timing = simulate(schedule, clock=args.clock, **_costs(args))
    return _numbers(schedule, timing, args) | {"messages": count_messages(schedule)}


def _percent(fraction: float | None) -> str:
    return "none" if fraction is None else f"{fraction:.1%}"


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            word.rjust(width) if place else word.ljust(width)
            for place, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
