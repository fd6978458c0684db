"""`trellax schedule`: one schedule drawn, saved or as numbers, or all of them in a table."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from ..meshes.columns import align_within
from ..meshes.errors import ScheduleError
from ..meshes.terminal import fold, terminal_width
from ..pipeline.schedules import (
    SCHEDULES,
    Formula,
    Schedule,
    StageCost,
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
from ..pipeline.schedules.grid import IDLE, column_widths, grid_words
from ..pipeline.schedules.picture import peak_text
from .asked_file import check_files, write_file
from .schedule_arguments import COSTS, check_schedule_arguments, read_layers

_STYLES = {"F": "white on blue", "B": "black on green", "I": "black on cyan", "W": "black on yellow"}


def run_schedule(args: argparse.Namespace) -> int:
    """Do what was asked and return the exit code.

    Raises:
        TrellaxError: what was asked does not fit together, or a file cannot be read or written.
    """
    check_schedule_arguments(args)
    check_files(*(getattr(args, option) for option in _WRITERS))
    if args.compare:
        _compare(args)
        return 0
    schedule = load_schedule(args.file, say=_say) if args.file else _build(args.name, args, num_chunks=args.chunks)
    timing = _simulate(schedule, args)
    is_saved = _save(schedule, args)
    if args.json:
        print(json.dumps(_numbers(schedule, timing, args)))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    if not is_saved:
        console.print(_draw_grid(schedule, width=terminal_width()))
    console.print(fold(_describe(schedule, timing, args), width=terminal_width()), markup=False)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _build(name: str, args: argparse.Namespace, *, num_chunks: int | None) -> Schedule:
    family = SCHEDULES[name]
    num_chunks = num_chunks or family.default_chunks
    if family.order == "searched":
        sizes = {"num_ranks": args.ranks, "num_microbatches": args.microbatches, "num_chunks": num_chunks}
        stages = _stages(name, args, num_ranks=args.ranks, num_chunks=num_chunks)
        more = {"stages": stages, "clock": args.clock, "max_in_flight": args.max_in_flight}
        return family(**sizes, **_rank_costs(args), **more)
    return build_schedule(
        name,
        num_ranks=args.ranks,
        num_microbatches=args.microbatches,
        num_chunks=num_chunks,
        clock=args.clock,
    )


def _rank_costs(args: argparse.Namespace) -> dict[str, float]:
    return {name: getattr(args, name) for name in COSTS}


def _costs(schedule: Schedule, args: argparse.Namespace) -> dict[str, Any]:
    sizes = {"num_ranks": schedule.num_ranks, "num_chunks": schedule.num_chunks}
    return _rank_costs(args) | {"stages": _stages(schedule.name, args, **sizes)}


def _stages(name: str, args: argparse.Namespace, *, num_ranks: int, num_chunks: int) -> list[StageCost] | None:
    """The times of stages of these sizes, of which the mean rank takes what the options say; None if all are alike."""
    if args.layers is None:
        return None
    layers = read_layers(args.layers)
    if len(layers) != num_ranks * num_chunks:
        raise ScheduleError(
            f"--layers {args.layers} has {len(layers)} numbers, but {name} of {num_ranks} ranks x "
            f"{num_chunks} chunks has {num_ranks * num_chunks} stages.",
            fix=f"write {num_ranks * num_chunks} numbers, from the first stage to the last.",
        )
    mean = sum(layers) / num_ranks
    return [
        StageCost(
            forward=args.forward * size / mean,
            input_grad=args.input_grad * size / mean,
            weight_grad=args.weight_grad * size / mean,
        )
        for size in layers
    ]


def _simulate(schedule: Schedule, args: argparse.Namespace) -> Timing:
    return simulate(schedule, clock=args.clock, **_costs(schedule, args))


def _find_formula(schedule: Schedule, args: argparse.Namespace) -> Formula | None:
    # A file may bear the name of a schedule of ours and be another.
    if args.file:
        return None
    return find_formula(schedule, forward=args.forward, input_grad=args.input_grad, weight_grad=args.weight_grad)


_WRITERS: dict[str, Callable[[Schedule, argparse.Namespace], bytes]] = {
    "png": lambda schedule, args: draw_picture(schedule, format="png", clock=args.clock, **_costs(schedule, args)),
    "svg": lambda schedule, args: draw_picture(schedule, format="svg", clock=args.clock, **_costs(schedule, args)),
    "csv": lambda schedule, _: schedule_to_csv(schedule).encode(),
    "trace": lambda schedule, args: trace_from_schedule(schedule, clock=args.clock, **_costs(schedule, args)).encode(),
}


def _save(schedule: Schedule, args: argparse.Namespace) -> bool:
    paths = {option: getattr(args, option) for option in _WRITERS if getattr(args, option)}
    for option, path in paths.items():
        write_file(path, _WRITERS[option](schedule, args))
    return bool(paths)


def _numbers(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> dict[str, Any]:
    formula = _find_formula(schedule, args)
    return {
        "name": schedule.name,
        "ranks": schedule.num_ranks,
        "chunks": schedule.num_chunks,
        "microbatches": schedule.num_microbatches,
        "layers": list(read_layers(args.layers)) if args.layers else None,
        "clock": timing.clock,
        "makespan": timing.makespan,
        "bubble_fraction": timing.bubble_fraction,
        "peak_in_flight": list(timing.peak_in_flight),
        "ticks": schedule.num_ticks,
        "formula_bubble_fraction": formula.bubble_fraction if formula else None,
    }


def _draw_grid(schedule: Schedule, *, width: int | None) -> Text:
    """The grid in colour, in as many blocks of whole ticks as the width asks for."""
    words = grid_words(schedule.ticks, num_ranks=schedule.num_ranks)
    widths = column_widths(words)
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
    if word == IDLE:
        text.append(word, style="dim")
        return
    for number, part in enumerate(word.split("+")):
        text.append("+" if number else "")
        text.append(part, style=next(style for kind, style in _STYLES.items() if kind in part))


def _describe(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> str:
    chunks = f" x {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    layers = f", stages of {', '.join(args.layers.split(','))}" if args.layers else ""
    size = f"{schedule.num_ranks} ranks{chunks}, {schedule.num_microbatches} microbatches"
    peaks = peak_text(timing.peak_in_flight)
    lines = [
        f"{schedule.name}: {size}, {timing.clock} clock{layers}",
        f"bubble {_percent(timing.bubble_fraction)} of the time, makespan {timing.makespan:g}, peak in flight {peaks}",
    ]
    formula = _find_formula(schedule, args)
    if formula:
        why = explain_difference(schedule, formula, timing, **_costs(schedule, args))
        lines.append(
            f"formula {formula.bubble_fraction:.1%} = {formula.text} ({formula.source})"
            + (f": {why}" if why else ", as simulated")
        )
    return "\n".join(lines)


def _compare(args: argparse.Namespace) -> None:
    rows = [
        _compare_one(name, args)
        for name, family in SCHEDULES.items()
        if not (family.chunks == "several" and args.chunks == 1)
    ]
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
    print(align_within([head, *body], width=terminal_width()))
    if any(row["chunks"] > 1 for row in rows):
        note = "In flight are microbatches of one chunk: with V chunks a rank, each holds 1/V of the rank's layers."
        print(fold(note, width=terminal_width()))


def _compare_one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    schedule = _build(name, args, num_chunks=1 if SCHEDULES[name].chunks == "one" else args.chunks)
    timing = _simulate(schedule, args)
    return _numbers(schedule, timing, args) | {"messages": count_messages(schedule)}


def _percent(fraction: float | None) -> str:
    return "none" if fraction is None else f"{fraction:.1%}"
