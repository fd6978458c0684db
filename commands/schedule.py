"""`trellax schedule`: draw, save or simulate a pipeline schedule, or compare all schedules in a table."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console

from ..meshes.columns import align_within
from ..meshes.errors import ScheduleError
from ..meshes.terminal import fold, terminal_width
from ..schedules import (
    SCHEDULES,
    Formula,
    Placement,
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
from ..schedules.messages import draw_messages
from ..schedules.picture import peak_text
from .arguments.schedule import COSTS, read_layers
from .output_file import check_output_files, write_output_file
from .schedule_grid import draw_grid

_MOST_RANKS = 16
"""Ranks whose stages are listed."""


def run_schedule(args: argparse.Namespace) -> int:
    """Print one schedule or the comparison, write the files asked for, and return the exit code.

    Raises:
        TrellaxError: the arguments do not fit the schedule, or a file cannot be read or written.
    """
    check_output_files(*(getattr(args, option) for option in _WRITERS))
    if args.compare:
        _print_comparison(args)
        return 0
    schedule = load_schedule(args.file, say=_say) if args.file else _build(args.name, args, num_chunks=args.chunks)
    timing = _simulate(schedule, args)
    is_saved = _save(schedule, args)
    if args.json:
        print(json.dumps(_list_numbers(schedule, timing, args)))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    if not is_saved:
        console.print(draw_grid(schedule, width=terminal_width()))
    if args.messages:
        console.print(draw_messages(schedule.messages()), markup=False)
    console.print(fold(_describe_schedule(schedule, timing, args), width=terminal_width()), markup=False)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _build(name: str, args: argparse.Namespace, *, num_chunks: int | None) -> Schedule:
    family = SCHEDULES[name]
    num_chunks = num_chunks or family.default_chunks
    if family.order == "searched":
        sizes = {"num_ranks": args.ranks, "num_microbatches": args.microbatches, "num_chunks": num_chunks}
        stages = _list_stage_costs(name, args, num_ranks=args.ranks, num_chunks=num_chunks)
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
    return _rank_costs(args) | {"stages": _list_stage_costs(schedule.name, args, **sizes)}


def _list_stage_costs(
    name: str, args: argparse.Namespace, *, num_ranks: int, num_chunks: int
) -> list[StageCost] | None:
    """Return the times of stages with the sizes of --layers, or None without --layers, for equal stages.

    The time options are those of a rank of average size; each stage takes a share in proportion to its layers.
    """
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
    # A file may be named like a built-in schedule and hold another one.
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
        write_output_file(path, _WRITERS[option](schedule, args))
    return bool(paths)


def _list_numbers(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> dict[str, Any]:
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
        "rank_of_stage": list(schedule.placement.ranks),
    } | ({"sent": [asdict(message) for message in schedule.messages()]} if args.messages else {})


def _describe_schedule(schedule: Schedule, timing: Timing, args: argparse.Namespace) -> str:
    chunks = f" x {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    layers = f", stages of {', '.join(args.layers.split(','))}" if args.layers else ""
    size = f"{schedule.num_ranks} ranks{chunks}, {schedule.num_microbatches} microbatches"
    bubble, peaks = _format_percent(timing.bubble_fraction), peak_text(timing.peak_in_flight)
    lines = [
        f"{schedule.name}: {size}, {timing.clock} clock{layers}",
        f"bubble {bubble} of the time, makespan {timing.makespan:g}, peak in flight {peaks}",
    ]
    if not schedule.placement.is_loop:
        lines.append(_describe_placement(schedule.placement))
    formula = _find_formula(schedule, args)
    if formula:
        why = explain_difference(schedule, formula, timing, **_costs(schedule, args))
        lines.append(
            f"formula {formula.bubble_fraction:.1%} = {formula.text} ({formula.source})"
            + (f": {why}" if why else ", as simulated")
        )
    return "\n".join(lines)


def _describe_placement(placement: Placement) -> str:
    """Return which rank holds which stages, of at most _MOST_RANKS ranks."""
    ranks = range(min(placement.num_ranks, _MOST_RANKS))
    held = [f"rank {rank}: {', '.join(map(str, placement.stages_of(rank)))}" for rank in ranks]
    return f"stages of {'; '.join(held)}{'; ...' if len(held) < placement.num_ranks else ''}"


def _print_comparison(args: argparse.Namespace) -> None:
    rows = [
        _compare_one(name, args)
        for name, family in SCHEDULES.items()
        if args.chunks is None or family.chunks == "one" or family.allows_chunks(args.chunks)
    ]
    if args.json:
        print(json.dumps(rows))
        return
    head = ("schedule", "chunks", "bubble", "formula", "makespan", "in flight", "at most", "messages")
    body = [
        (
            str(row["name"]),
            str(row["chunks"]),
            _format_percent(row["bubble_fraction"]),
            _format_percent(row["formula_bubble_fraction"]),
            f"{row['makespan']:g}",
            str(max(row["peak_in_flight"])),
            str(row["formula_peak_in_flight"] or "none"),
            str(row["messages"]),
        )
        for row in rows
    ]
    print(f"{args.ranks} ranks, {args.microbatches} microbatches, {args.clock} clock")
    print(align_within([head, *body], width=terminal_width()))
    if any(row["chunks"] > 1 for row in rows):
        note = (
            "In flight are microbatches of one chunk: with V chunks a rank, each holds 1/V of the rank's layers. "
            "At most is their number by the formula of the schedule."
        )
        print(fold(note, width=terminal_width()))


def _compare_one(name: str, args: argparse.Namespace) -> dict[str, Any]:
    schedule = _build(name, args, num_chunks=1 if SCHEDULES[name].chunks == "one" else args.chunks)
    timing = _simulate(schedule, args)
    return _list_numbers(schedule, timing, args) | {
        "formula_peak_in_flight": _formula_peak(schedule),
        "messages": count_messages(schedule),
    }


def _formula_peak(schedule: Schedule) -> int | None:
    """Return the most microbatches of a chunk in flight by the family's formula, which is for lockstep."""
    everything = schedule.num_microbatches * schedule.num_chunks
    formula = SCHEDULES[schedule.name].peak_in_flight
    if callable(formula):
        return min(everything, formula(schedule.num_ranks, schedule.num_chunks, "ends"))
    return everything if formula == "all" else None


def _format_percent(fraction: float | None) -> str:
    return "none" if fraction is None else f"{fraction:.1%}"
