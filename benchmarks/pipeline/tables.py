"""Print the measurements of the pipeline benchmark: one table per question, then the targets."""

from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.targets import MIB, Target, make_table

# Measured by us on the same work and 8 fake devices (pipe=4 x data=2): GPipe as vmap and shift, m -> MiB.
MAXTEXT_MIB = {
    "block": {4: 20.8, 8: 22.1, 16: 24.6, 32: 29.6},
    "none": {4: 150, 8: 227, 16: 379, 32: 685},
}


def print_report(report: dict[str, Any], targets: list[Target]) -> None:
    """Print all tables to stdout, in Markdown."""
    console = Console(width=140, highlight=False)
    about = report["about"]
    console.print(
        f"jax {about['jax']}, Python {about['python']}, {about['cpu_cores']} cores, load before "
        f"{about['load_before']:.1f}, malloc {about['malloc']}"
    )
    console.print(
        "Training step: hidden 256, 8 layers, 4 heads, sequence 128, microbatch 4, vocabulary 1024, float32, AdamW"
    )
    for table in (
        _memory_table(report["memory"]),
        *_step_tables(report["step_time"], about["rounds"]),
        _compile_table(report["compile"], about["compile_rounds"]),
        _work_memory_table(report["work_memory"]),
        _work_table(report["work"]),
        _bubble_table(report["bubbles"]),
        _target_table(targets),
    ):
        # Printed by itself, since rich would wrap a title to the width of its table.
        title, table.title = table.title, None
        console.print(f"\n**{title}**")
        console.print(table)


def _memory_table(rows: list[dict[str, Any]]) -> Table:
    counts = sorted({row["num_microbatches"] for row in rows})
    table = make_table("Training step on 4 stages: compiled temporary memory, MiB a device", "schedule", *_m(counts))
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        own = {row["num_microbatches"]: row["temp_bytes"] for row in rows if row["schedule"] == schedule}
        table.add_row(schedule, *(f"{own[m] / MIB:.1f}" for m in counts))
    return table


def _step_tables(rows: list[dict[str, Any]], rounds: int) -> list[Table]:
    ways = {
        "stages": "4 stages, 1F1B",
        "accumulation": "one device, accumulation",
        "full_batch": "one device, full batch",
    }
    seconds = make_table(
        f"Training step: seconds, median (minimum) of {rounds} interleaved rounds", "m", "clock", *ways.values()
    )
    ratios = make_table(
        "4 stages over the better of one device", "m", "wall, medians", "wall, minimums", "CPU, medians"
    )
    for row in rows:
        m = str(row["num_microbatches"])
        for clock, name in {"wall_s": "wall", "cpu_s": "CPU"}.items():
            seconds.add_row(m, name, *(f"{row[way][clock]:.3f} ({row[way][f'{clock}_min']:.3f})" for way in ways))
        ratios.add_row(m, *(f"{row[key]:.3f}" for key in ("wall_ratio", "wall_ratio_min", "cpu_ratio")))
    return [seconds, ratios]


def _compile_table(rows: list[dict[str, Any]], rounds: int) -> Table:
    title = f"Training step, 1F1B on 4 stages: tracing and compiling, minimum of {rounds} interleaved rounds"
    table = make_table(title, "m", "wall s", "CPU s", "HLO instructions")
    for row in rows:
        table.add_row(
            str(row["num_microbatches"]), f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}", str(row["instructions"])
        )
    return table


def _work_memory_table(rows: list[dict[str, Any]]) -> Table:
    counts = sorted({row["num_microbatches"] for row in rows})
    title = "Work R1 (own model, pipe=4 x data=2): compiled temporary memory, MiB a device"
    table = make_table(title, "executor", "remat", *_m(counts))
    for schedule, remat in dict.fromkeys((row["schedule"], row["remat"]) for row in rows):
        own = {
            row["num_microbatches"]: row["temp_bytes"] / MIB
            for row in rows
            if (row["schedule"], row["remat"]) == (schedule, remat)
        }
        table.add_row(f"trellax {schedule}", remat, *(f"{own[m]:.1f}" for m in counts))
    for remat, theirs in MAXTEXT_MIB.items():
        table.add_row("MaxText GPipe (measured earlier)", remat, *(f"{theirs[m]:.1f}" for m in counts))
    return table


def _work_table(rows: list[dict[str, Any]]) -> Table:
    title = "Work R1, 1F1B: executed in one step, counted in a profiler trace (collectives a device)"
    heads = ("m", "remat", "matmul work / ideal without recomputation", "gradient all-reduces", "permutes", "2(m+3)")
    table = make_table(title, *heads)
    for row in rows:
        m, work = row["num_microbatches"], f"{row['matmul_over_ideal']:.3f}"
        collectives = f"{row['gradient_all_reduces']:g}", f"{row['permutes']:g}"
        table.add_row(str(m), row["remat"], work, *collectives, str(2 * (m + 3)))
    return table


def _bubble_table(rows: list[dict[str, Any]]) -> Table:
    table = make_table("Bubbles filled with NaN: loss and gradients against zeros", "model", "schedule", "m", "result")
    for row in rows:
        result = "same bits" if row["is_same"] else "DIFFERENT"
        table.add_row(row["model"], row["schedule"], str(row["num_microbatches"]), result)
    return table


def _target_table(targets: list[Target]) -> Table:
    table = make_table("Targets", "what", "measured", "at most", "verdict")
    for target in targets:
        table.add_row(target.name, f"{target.measured:.3f}", f"{target.limit:g}", "met" if target.is_met else "MISSED")
    return table


def _m(counts: list[int]) -> list[str]:
    return [f"m={m}" for m in counts]
