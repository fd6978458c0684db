"""Print the measurements of the pipeline benchmark: one table per question, then the targets."""

from typing import Any

from benchmarks.tables import MIB, Rows, format_table
from benchmarks.targets import Target, format_targets

# Measured by us on the same work and 8 fake devices (pipe=4 x data=2): GPipe as vmap and shift, m -> MiB.
MAXTEXT_MIB = {
    "block": {4: 20.8, 8: 22.1, 16: 24.6, 32: 29.6},
    "none": {4: 150, 8: 227, 16: 379, 32: 685},
}


def print_report(report: dict[str, Any], targets: list[Target]) -> None:
    """Print all tables to stdout, in Markdown."""
    about = report["about"]
    print(
        f"jax {about['jax']}, Python {about['python']}, {about['cpu_cores']} cores, load before "
        f"{about['load_before']:.1f}, malloc {about['malloc']}"
    )
    print("Training step: hidden 256, 8 layers, 4 heads, sequence 128, microbatch 4, vocabulary 1024, float32, AdamW")
    for table in (
        _memory_table(report["memory"]),
        *_step_tables(report["step_time"], about["rounds"]),
        _compile_table(report["compile"], about["compile_rounds"]),
        _work_memory_table(report["work_memory"]),
        _work_table(report["work"]),
        _bubble_table(report["bubbles"]),
        format_targets(targets),
    ):
        print(table)


def _memory_table(rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["num_microbatches"] for row in rows})
    table = [("schedule", *_m(counts))]
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        own = {row["num_microbatches"]: row["temp_bytes"] for row in rows if row["schedule"] == schedule}
        table.append((schedule, *(f"{own[m] / MIB:.1f}" for m in counts)))
    return format_table("Training step on 4 stages: compiled temporary memory, MiB a device", table)


def _step_tables(rows: list[dict[str, Any]], rounds: int) -> list[str]:
    ways = {
        "stages": "4 stages, 1F1B",
        "accumulation": "one device, accumulation",
        "full_batch": "one device, full batch",
    }
    seconds = [("m", "clock", *ways.values())]
    ratios: Rows = [("m", "wall, medians", "wall, minimums", "CPU, medians")]
    for row in rows:
        m = str(row["num_microbatches"])
        for clock, name in {"wall_s": "wall", "cpu_s": "CPU"}.items():
            seconds.append((m, name, *(f"{row[way][clock]:.3f} ({row[way][f'{clock}_min']:.3f})" for way in ways)))
        ratios.append((m, *(f"{row[key]:.3f}" for key in ("wall_ratio", "wall_ratio_min", "cpu_ratio"))))
    return [
        format_table(f"Training step: seconds, median (minimum) of {rounds} interleaved rounds", seconds),
        format_table("4 stages over the better of one device", ratios),
    ]


def _compile_table(rows: list[dict[str, Any]], rounds: int) -> str:
    title = f"Training step, 1F1B on 4 stages: tracing and compiling, minimum of {rounds} interleaved rounds"
    table = [("m", "wall s", "CPU s", "HLO instructions")]
    for row in rows:
        m, instructions = str(row["num_microbatches"]), str(row["instructions"])
        table.append((m, f"{row['wall_s']:.2f}", f"{row['cpu_s']:.2f}", instructions))
    return format_table(title, table)


def _work_memory_table(rows: list[dict[str, Any]]) -> str:
    counts = sorted({row["num_microbatches"] for row in rows})
    title = "Work R1 (own model, pipe=4 x data=2): compiled temporary memory, MiB a device"
    table = [("executor", "remat", *_m(counts))]
    for schedule, remat in dict.fromkeys((row["schedule"], row["remat"]) for row in rows):
        own = {
            row["num_microbatches"]: row["temp_bytes"] / MIB
            for row in rows
            if (row["schedule"], row["remat"]) == (schedule, remat)
        }
        table.append((f"trellax {schedule}", remat, *(f"{own[m]:.1f}" for m in counts)))
    for remat, theirs in MAXTEXT_MIB.items():
        table.append(("MaxText GPipe (measured earlier)", remat, *(f"{theirs[m]:.1f}" for m in counts)))
    return format_table(title, table)


def _work_table(rows: list[dict[str, Any]]) -> str:
    title = "Work R1, 1F1B: executed in one step, counted in a profiler trace (collectives a device)"
    head = ("m", "remat", "matmul work / ideal without recomputation", "gradient all-reduces", "permutes", "2(m+3)")
    table = [head]
    for row in rows:
        m, work = row["num_microbatches"], f"{row['matmul_over_ideal']:.3f}"
        collectives = f"{row['gradient_all_reduces']:g}", f"{row['permutes']:g}"
        table.append((str(m), row["remat"], work, *collectives, str(2 * (m + 3))))
    return format_table(title, table)


def _bubble_table(rows: list[dict[str, Any]]) -> str:
    table = [("model", "schedule", "m", "result")]
    for row in rows:
        result = "same bits" if row["is_same"] else "DIFFERENT"
        table.append((row["model"], row["schedule"], str(row["num_microbatches"]), result))
    return format_table("Bubbles filled with NaN: loss and gradients against zeros", table)


def _m(counts: list[int]) -> list[str]:
    """Return the heads of columns for numbers of microbatches."""
    return [f"m={m}" for m in counts]
