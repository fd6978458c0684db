"""Measure memory, speed, compile time and executed work of pipelined training steps.

Command:  python benchmarks/pipeline/run.py [--quick] [--json] [--malloc default]
Time: about 8 minutes on two cores, 2 with --quick.

The benchmark measures memory, step time against one device, compile time, work R1 (a user's own model, see
`../workers/work_r1.py`), and results when bubbles are filled with NaN. It compares each with a target; the exit code is
1 if one is missed. Tables go to stdout, progress to stderr. The last results are in RESULTS.md.

Fake devices share the cores, so waiting is free and CPU seconds are printed beside wall seconds. All workers, including
the one-device one, allocate huge pages: by default, glibc returns the temporary buffers to the system after each step
and pays 0.2 s of page faults for the next. `--malloc default` measures without huge pages. Other programs on the
machine distort step times and even their ratios: look at the load in the first line of the output.
"""

import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.arguments import make_parser
from benchmarks.pipeline.tables import print_report
from benchmarks.rounds import Ways, take_turns, tell
from benchmarks.tables import MIB
from benchmarks.targets import Target, exit_code, print_json
from benchmarks.workers.process import Malloc, Worker

SCHEDULES = ("1f1b", "gpipe")
NUM_SEQUENCES = 4
"""In each microbatch of the training step."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """Numbers of microbatches and rounds to measure."""

    memory: tuple[int, ...] = (4, 8, 16, 32)
    step_time: tuple[int, ...] = (4, 8, 16)
    work: tuple[int, ...] = (4, 8, 32)
    rounds: int = 10
    compile_rounds: int = 4


QUICK = Effort(memory=(8, 32), step_time=(8,), work=(4,), rounds=5, compile_rounds=2)


def main() -> int:
    parser = make_parser(__doc__, quick="fewer microbatch counts and rounds")
    parser.add_argument("--malloc", choices=("huge", "default"), default="huge", help="how all workers allocate")
    arguments = parser.parse_args()
    report = measure_all(QUICK if arguments.quick else Effort(), malloc=arguments.malloc)
    targets = judge(report)
    if arguments.json:
        print_json(report, targets)
    else:
        print_report(report, targets)
    return exit_code(targets)


def measure_all(effort: Effort, *, malloc: Malloc) -> dict[str, Any]:
    """Return all measurements as plain data."""
    with (
        Worker("benchmarks.workers.train_step", num_devices=4, malloc=malloc) as stages,
        Worker("benchmarks.workers.train_step", num_devices=1, malloc=malloc) as device,
        Worker("benchmarks.workers.work_r1", num_devices=8, malloc=malloc) as work,
    ):
        about = {"cpu_cores": os.cpu_count(), "load_before": os.getloadavg()[0], "malloc": malloc, **asdict(effort)}
        return {
            "about": stages.ask("about") | about,
            "step_time": [_measure_steps(stages, device, m, effort.rounds) for m in effort.step_time],
            "compile": _measure_compile(stages, effort.compile_rounds),
            "memory": _measure_memory(stages, effort.memory),
            "work_memory": _measure_work_memory(work, effort.memory),
            "work": _measure_work(work, effort.work),
            "bubbles": _check_bubbles(stages, work),
        }


def judge(report: dict[str, Any]) -> list[Target]:
    """Compare the measurements with the targets of the pipeline."""
    temp = {row["num_microbatches"]: row["temp_bytes"] for row in report["memory"] if row["schedule"] == "1f1b"}
    (step,) = (row for row in report["step_time"] if row["num_microbatches"] == 8)
    small, large = report["compile"]
    ours = [row for row in report["work_memory"] if row["schedule"] == "1f1b"]
    remat, none = (max(row["temp_bytes"] for row in ours if row["remat"] == r) / MIB for r in ("block", "none"))
    plain = [row for row in report["work"] if row["remat"] == "none"]
    return [
        Target.at_most("1F1B memory, m=32 over m=8", temp[32] / temp[8], 1.02),
        Target.at_most("step time, 4 stages over one device, m=8 (medians)", step["wall_ratio"], 1.10),
        Target.at_most("compile time, m=64 over m=4", large["wall_s"] / small["wall_s"], 1.05),
        Target.at_most("HLO instructions, m=64 over m=4", large["instructions"] / small["instructions"], 1.05),
        Target.at_most("R1 memory with remat, MiB, largest over m", remat, 17),
        Target.at_most("R1 memory without remat, MiB, largest over m", none, 165),
        Target.at_most("R1 matmul work over ideal, without remat", max(r["matmul_over_ideal"] for r in plain), 1.0),
        Target.at_most("R1 gradient all-reduces", max(r["gradient_all_reduces"] for r in report["work"]), 1),
        Target.at_most(
            "R1 permutes over 2(m+3)", max(r["permutes"] / (2 * (r["num_microbatches"] + 3)) for r in plain), 1.0
        ),
        Target.at_most("results changed by NaN in the bubbles", sum(not r["is_same"] for r in report["bubbles"]), 0),
    ]


def _measure_steps(stages: Worker, device: Worker, num_microbatches: int, rounds: int) -> dict[str, Any]:
    """Time three ways to do the same work in turns."""
    both = {"num_microbatches": num_microbatches, "num_sequences": NUM_SEQUENCES}
    full = {"num_microbatches": 1, "num_sequences": NUM_SEQUENCES * num_microbatches}
    ways: Ways = {
        "stages": lambda: stages.ask("step", **both),
        "accumulation": lambda: device.ask("step", **both),
        "full_batch": lambda: device.ask("step", **full),
    }
    seconds = take_turns(ways, rounds=rounds, what=f"step time, m={num_microbatches}", warm_up="every turn")
    row: dict[str, Any] = {"num_microbatches": num_microbatches}
    for name, own in seconds.items():
        for clock in ("wall_s", "cpu_s"):
            values = [one[clock] for one in own]
            row[name] = row.get(name, {}) | {clock: statistics.median(values), f"{clock}_min": min(values)}
    for name, clock in {"wall_ratio": "wall_s", "wall_ratio_min": "wall_s_min", "cpu_ratio": "cpu_s"}.items():
        row[name] = row["stages"][clock] / min(row["accumulation"][clock], row["full_batch"][clock])
    return row


def _measure_compile(stages: Worker, rounds: int) -> list[dict[str, Any]]:
    """Compile for few and many microbatches in turns; the minimum counts, since other load can only add time."""
    runs: dict[int, list[dict[str, float]]] = {4: [], 64: []}
    for turn in range(rounds):
        for m, own in runs.items():
            tell(f"compile time, m={m}, round {turn + 1} of {rounds}")
            own.append(stages.ask("compile", schedule="1f1b", num_microbatches=m))
    return [
        {"num_microbatches": m} | {key: min(one[key] for one in own) for key in ("wall_s", "cpu_s", "instructions")}
        for m, own in runs.items()
    ]


def _measure_memory(stages: Worker, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = [{"schedule": name, "num_microbatches": m} for name in SCHEDULES for m in counts]
    return [row | {"temp_bytes": _ask(stages, "compile", row)["temp_bytes"]} for row in rows]


def _measure_work_memory(work: Worker, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = [
        {"schedule": name, "remat": remat, "num_microbatches": m}
        for name in SCHEDULES
        for remat in ("block", "none")
        for m in counts
    ]
    return [row | {"temp_bytes": _ask(work, "memory", row)} for row in rows]


def _measure_work(work: Worker, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    rows = [{"schedule": "1f1b", "remat": remat, "num_microbatches": m} for remat in ("none", "block") for m in counts]
    return [row | _ask(work, "work", row) for row in rows]


def _check_bubbles(stages: Worker, work: Worker) -> list[dict[str, Any]]:
    return [
        {"model": model, "schedule": name, "num_microbatches": m}
        | {"is_same": _ask(worker, "bubbles", {"schedule": name, "num_microbatches": m})}
        for model, worker in {"R1": work, "transformer": stages}.items()
        for name in SCHEDULES
        for m in (2, 8)
    ]


def _ask(worker: Worker, call: str, row: dict[str, Any]) -> Any:
    tell(f"{call} {', '.join(f'{key}={value}' for key, value in row.items())}")
    return worker.ask(call, **row)


if __name__ == "__main__":
    sys.exit(main())
