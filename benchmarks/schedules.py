"""What each schedule costs: `python benchmarks/schedules.py [--json]`, about 4 minutes on two cores.

On work R1 (see `work_r1.py`) without remat, 4 ranks x 2 data shards: compiled temporary memory, which may grow with
microbatches for GPipe alone; matmul work executed, counted in a profiler trace, over the ideal; permutes; and the
bubble that the lockstep clock predicts. Nothing is timed: fake devices share the cores, so bubbles cost them nothing.
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from tables import MIB, Target
from trellax.pipeline.schedules import build_schedule, simulate
from worker import Worker

SCHEDULES = ("naive", "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1", "auto")
MICROBATCHES = (4, 8, 16, 32)
RANKS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    with Worker("work_r1.py", num_devices=8) as worker:
        rows = [_measure(worker, schedule) for schedule in SCHEDULES]
    targets = judge(rows)
    if arguments.json:
        print(json.dumps({"rows": rows, "targets": [asdict(target) for target in targets]}, indent=2))
    else:
        _print_tables(rows, targets)
    return 0 if all(target.is_met for target in targets) else 1


def judge(rows: list[dict[str, Any]]) -> list[Target]:
    """Return every promise about schedules with what was measured for it."""
    bounded = [row for row in rows if row["schedule"] != "gpipe"]
    growth = max(row["temp_mib"][32] / row["temp_mib"][8] for row in bounded)
    (zb_h1,) = (row for row in rows if row["schedule"] == "zb-h1")
    return [
        Target.at_most("memory, m=32 over m=8, all but gpipe", growth, 1.02),
        Target.at_most("zb-h1 memory, MiB, largest over m", max(zb_h1["temp_mib"].values()), 110),
        Target.at_most("matmul work over ideal, all", max(row["matmul_over_ideal"] for row in rows), 1.0),
    ]


def _measure(worker: Worker, schedule: str) -> dict[str, Any]:
    print(f"{schedule} ...", file=sys.stderr)
    chunks = 2 if schedule.startswith("interleaved") else 1
    timings = {
        m: simulate(build_schedule(schedule, num_ranks=RANKS, num_microbatches=m, num_chunks=chunks))
        for m in MICROBATCHES
    }
    memory = {m: worker.ask("memory", schedule=schedule, remat="none", num_microbatches=m) / MIB for m in MICROBATCHES}
    work = worker.ask("work", schedule=schedule, remat="none", num_microbatches=8)
    return {
        "schedule": schedule,
        "chunks": chunks,
        "temp_mib": memory,
        "bubble_fraction": {m: timing.bubble_fraction for m, timing in timings.items()},
        "makespan": {m: timing.makespan for m, timing in timings.items()},
        "peak_in_flight": list(timings[8].peak_in_flight),
        "matmul_over_ideal": work["matmul_over_ideal"],
        "permutes": work["permutes"],
    }


def _print_tables(rows: list[dict[str, Any]], targets: list[Target]) -> None:
    console = Console(width=180, highlight=False)
    table = Table(box=MARKDOWN)
    for name in ("schedule", "chunks", *(f"MiB m={m}" for m in MICROBATCHES), "bubble m=8", "bubble m=32"):
        table.add_column(name, justify="left" if name == "schedule" else "right", no_wrap=True)
    for name in ("in flight m=8", "work m=8", "permutes m=8"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        bubbles = (f"{row['bubble_fraction'][m]:.1%}" for m in (8, 32))
        sizes = (f"{row['temp_mib'][m]:.1f}" for m in MICROBATCHES)
        held = ", ".join(map(str, row["peak_in_flight"]))
        work = f"{row['matmul_over_ideal']:.3f}"
        table.add_row(row["schedule"], str(row["chunks"]), *sizes, *bubbles, held, work, f"{row['permutes']:.0f}")
    console.print(table)
    for target in targets:
        verdict = "met" if target.is_met else "MISSED"
        console.print(f"{verdict}: {target.name}: {target.measured:.3f}, at most {target.limit:g}")


if __name__ == "__main__":
    sys.exit(main())
