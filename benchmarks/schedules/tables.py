"""Print the measurements of the schedules benchmark: one table per question, then verdicts and targets."""

from typing import Any

from benchmarks.schedules.activations import tabulate_activations
from benchmarks.schedules.times import SHARES
from benchmarks.tables import MIB, Rows, format_table
from benchmarks.targets import Target, format_targets


def print_report(report: dict[str, Any], targets: list[Target]) -> None:
    """Print all tables to stdout, in Markdown."""
    about = report["about"]
    print(f"{about['cpu_cores']} cores, load before {about['load_before']:.1f}")
    parts = [
        ("Work R1, 4 ranks x 2 data shards: memory, work, permutes, simulated bubble", _memory_table(report["rows"])),
        *((_activations_title(rows), tabulate_activations(rows)) for rows in report["activations"]),
    ]
    if "times" in report:
        parts += [
            (_action_title(about), _action_table(report["actions"])),
            *((_time_title(rows, about), _time_table(rows)) for rows in report["times"]),
            (_vocabulary_title(report["vocabulary"], about), _vocabulary_table(report["vocabulary"])),
        ]
    for title, rows in parts:
        print(format_table(title, rows))
    if "times" in report:
        print(f"\n{report['vocabulary_verdict']}")
        print("\n**Verdicts**\n")
        for line in report["verdicts"]:
            print(f"- {line}")
    print(format_targets(targets))


def _memory_table(rows: list[dict[str, Any]]) -> Rows:
    sizes = [f"MiB m={m}" for m in rows[0]["temp_mib"]]
    bubbles = ("bubble m=8", "bubble m=32")
    head = ("schedule", "chunks", *sizes, *bubbles, "in flight m=8", "work m=8", "permutes m=8")
    body = [
        (
            row["schedule"],
            str(row["chunks"]),
            *(f"{size:.1f}" for size in row["temp_mib"].values()),
            *(f"{row['bubble_fraction'][m]:.1%}" for m in (8, 32)),
            ", ".join(map(str, row["peak_in_flight"])),
            f"{row['matmul_over_ideal']:.3f}",
            f"{row['permutes']:.0f}",
        )
        for row in rows
    ]
    return [head, *body]


def _activations_title(rows: list[dict[str, Any]]) -> str:
    p = rows[0]["num_ranks"]
    return (
        f"Work R1, {p} ranks, {2 * p} blocks: activations, the part of the memory that slots take, over those of 1F1B, "
        "of ZB-H1, and of 1F1B if it held p microbatches"
    )


def _action_title(about: dict[str, Any]) -> str:
    return (
        "Work R1, 4 ranks x 1 data shard: milliseconds of one action of a rank's layers, one rank acting at a time, "
        f"medians over the actions of {about['traces']} traced steps, means over ranks"
    )


def _action_table(actions: dict[str, Any]) -> Rows:
    table: Rows = [("backward", "F", "B", "I", "W", "all", "in no action", "of two ranks at once", "outside the loop")]
    for name, own in actions.items():
        seconds = own["seconds"]
        times = (f"{seconds[kind] * 1e3:.2f}" if kind in seconds else "" for kind in "FBIW")
        table.append((name, *times, f"{sum(seconds.values()) * 1e3:.2f}", *(f"{own[s]:.1%}" for s in SHARES)))
    return table


def _time_title(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    m = rows[0]["num_microbatches"]
    return (
        f"Work R1, 4 ranks, m={m}: simulated ticks over 1f1b's and busy share, with F = I = W and with the times above "
        f"(a chunk of v takes 1/v); steps on shared cores, medians of {about['steps'][m]} interleaved rounds"
    )


def _time_table(rows: list[dict[str, Any]]) -> Rows:
    head = ("schedule", "F=I=W", "busy", "ticks ms", "ticks", "busy", "wall s", "wall", "wall min", "CPU s", "CPU")
    body = [
        (
            row["schedule"],
            f"{row['unit_ratio']:.2f}",
            f"{row['unit_busy']:.1%}",
            f"{row['ticks_s'] * 1e3:.0f}",
            f"{row['ticks_ratio']:.2f}",
            f"{row['ticks_busy']:.1%}",
            f"{row['wall_s']:.3f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['wall_min_ratio']:.2f}",
            f"{row['cpu_s']:.3f}",
            f"{row['cpu_ratio']:.2f}",
        )
        for row in rows
    ]
    return [head, *body]


def _vocabulary_title(vocabulary: dict[str, Any], about: dict[str, Any]) -> str:
    head, embedding, layers = (vocabulary[f"{key}_s"] * 1e3 for key in ("head", "embedding", "layers_of_a_stage"))
    return (
        "Transformer with a vocabulary of 8192 (hidden 256, 8 layers, sequence 128, microbatch 4, untied, float32), "
        f"1F1B on 4 ranks, m={vocabulary['num_microbatches']}: measured one rank at a time, for a microbatch: layers "
        f"of a stage {layers:.2f} ms, head {head:.2f} ms, embedding {embedding:.2f} ms, in no action "
        f"{vocabulary['unknown_share']:.1%}; steps are medians of {about['vocabulary_rounds']} interleaved rounds"
    )


def _vocabulary_table(vocabulary: dict[str, Any]) -> Rows:
    memory = ("params MiB", "temp MiB", "slots x, grad, saved", "in flight")
    traffic = ("all-reduces/microbatch", "once a step")
    head = ("vocabulary", *memory, *traffic, "last/mean", "ticks ms", "busy", "wall s", "CPU s")
    body = [
        (
            name,
            *(f"{row[key] / MIB:.1f}" for key in ("param_bytes", "temp_bytes")),
            ", ".join(str(row[f"{key}_slots"]) for key in ("activation", "gradient", "save")),
            ", ".join(map(str, row["peak_in_flight"])),
            *(f"{row['all_reduces'][key]:g}" for key in ("a_microbatch", "once_a_step")),
            f"{row['last_over_mean']:.2f}",
            f"{row['ticks_s'] * 1e3:.0f}",
            f"{row['ticks_busy']:.1%}",
            f"{row['wall_s']:.3f}",
            f"{row['cpu_s']:.3f}",
        )
        for name, row in vocabulary["rows"].items()
    ]
    return [head, *body]
