"""Measure the activations of each schedule in compiled memory, and compare them with 1F1B's.

Temporary memory is activations, one slot for each microbatch of a chunk that a rank holds, and a rest that no schedule
changes: sums of gradients, and room for a layer to work in. Two programs of one schedule that differ in slots alone,
one with a single microbatch and one with enough to fill the pipeline, tell them apart:

    bytes of a slot = (bytes with enough - bytes with one) / (slots with enough - slots with one)
    activations     = slots with enough * bytes of a slot

Most of a slot is residuals, and their buffers, which the loop over turns carries, are measured too. The rest of a slot
differs between compilers: XLA copies some of the buffers where an input gradient writes to what it has read, on CPUs.
V-shaped schedules are also compared with ZB-H1, whose backward is split as theirs, and with 1F1B if it held p
microbatches, as in programs of their own; in lockstep pairs of a forward and a backward it holds 2 (p - 1).
"""

from typing import Any

from benchmarks.rounds import tell
from benchmarks.tables import MIB, Rows
from benchmarks.targets import Target
from benchmarks.workers.process import Worker

SCHEDULES = ("1f1b", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1", "zb-v", "v-half", "v-min", "dualpipev")

LIMITS = {"v-half": 0.6, "v-min": 0.45, "zb-v": 1.05}
"""The largest activations over 1F1B's."""


def measure_activations(worker: Worker, *, num_ranks: int) -> list[dict[str, Any]]:
    """Return slots, bytes of a slot and activations of each schedule, on a number of ranks, and ratios to others."""
    rows = [_measure(worker, schedule, num_ranks) for schedule in SCHEDULES]
    of = {row["schedule"]: row for row in rows}
    references = {
        "1f1b": of["1f1b"]["activations_mib"],
        "zb-h1": of["zb-h1"]["activations_mib"],
        "p of 1f1b": of["1f1b"]["slot_mib"] * num_ranks,
    }
    for row in rows:
        row["over"] = {name: row["activations_mib"] / mib for name, mib in references.items()}
        row["residuals_over"] = row["residuals_mib"] / of["1f1b"]["residuals_mib"]
    return rows


def judge_activations(rows: list[dict[str, Any]]) -> list[Target]:
    """Compare the activations on one number of ranks with the targets of V-shaped schedules."""
    of, p = {row["schedule"]: row for row in rows}, rows[0]["num_ranks"]
    targets = [
        Target.at_most(f"{name} activations over 1f1b's, p={p}", of[name]["over"]["1f1b"], limit)
        for name, limit in LIMITS.items()
    ]
    growth = max(of[name]["temp_mib"][4 * p] / of[name]["temp_mib"][2 * p] for name in LIMITS)
    return [*targets, Target.at_most(f"V-shaped memory, m={4 * p} over m={2 * p}, p={p}", growth, 1.02)]


def tabulate_activations(rows: list[dict[str, Any]]) -> Rows:
    """Return the table of the activations on one number of ranks."""
    sizes = [f"MiB m={m}" for m in rows[0]["temp_mib"]]
    ratios = [f"over {name}" for name in rows[0]["over"]]
    parts = ("MiB a slot", "activations MiB", "rest MiB")
    head = ("schedule", "slots", *sizes, *parts, *ratios, "residuals MiB", "over 1f1b")
    body = [
        (
            row["schedule"],
            str(row["slots"]),
            *(f"{size:.1f}" for size in row["temp_mib"].values()),
            *(f"{row[key]:.1f}" for key in ("slot_mib", "activations_mib", "rest_mib")),
            *(f"{ratio:.2f}" for ratio in row["over"].values()),
            f"{row['residuals_mib']:.1f}",
            f"{row['residuals_over']:.2f}",
        )
        for row in rows
    ]
    return [head, *body]


def _measure(worker: Worker, schedule: str, num_ranks: int) -> dict[str, Any]:
    tell(f"activations: {schedule}, p={num_ranks}")
    # From twice as many microbatches as ranks on, every schedule holds the most that it ever does.
    counts = (1, 2 * num_ranks, 4 * num_ranks)
    given = [{"schedule": schedule, "num_microbatches": m, "num_ranks": num_ranks} for m in counts]
    mib = [worker.ask("memory", remat="none", **one) / MIB for one in given]
    few, *_, enough = [worker.ask("slots", **one) for one in given]
    slots = enough["slots"]
    slot_mib = (mib[-1] - mib[0]) / (slots - few["slots"])
    return {
        "schedule": schedule,
        "num_ranks": num_ranks,
        "slots": slots,
        "temp_mib": dict(zip(counts, mib, strict=True)),
        "slot_mib": slot_mib,
        "activations_mib": slots * slot_mib,
        "residuals_mib": enough["residual_bytes"] / MIB,
        "rest_mib": mib[-1] - slots * slot_mib,
    }
