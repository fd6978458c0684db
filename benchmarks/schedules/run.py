"""Compare all pipeline schedules: memory, executed work, simulated ticks and measured steps.

Command:  python benchmarks/schedules/run.py [--quick] [--memory] [--json]
Time: 10 minutes with --quick and 8 with --memory on two busy cores. Other programs on the machine distort times.

The model is work R1 (see `../workers/work_r1.py`) without remat on 4 ranks. With 2 data shards it measures the compiled
temporary memory, which may grow with the number of microbatches for GPipe only; the executed matmul work, counted in a
profiler trace, over the ideal; permutes; the bubble by the lockstep clock; and, on 4 and on 8 ranks, how much of the
memory is activations (see `activations.py`). With 1 data shard it measures times of actions, the ticks of every
schedule by these times, and whole steps (see `times.py`). The last part is a transformer with a large vocabulary, on
the end stages or split over all ranks.

Fake devices share the cores, so a bubble costs a measured step nothing, while ticks are the time of ranks that each
have a device. The verdicts say where the two disagree. Tables go to stdout, progress to stderr; the exit code is 1 if a
target is missed.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from trellax.schedules import simulate

from benchmarks.arguments import make_parser
from benchmarks.rounds import tell
from benchmarks.schedules.activations import judge_activations, measure_activations
from benchmarks.schedules.tables import print_report
from benchmarks.schedules.times import build, measure_actions, measure_times, measure_vocabulary, num_chunks
from benchmarks.schedules.verdicts import compare_schedules, compare_vocabularies, explain_actions
from benchmarks.tables import MIB
from benchmarks.targets import Target, exit_code, print_json
from benchmarks.workers.process import Worker

LOOPS = ("naive", "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1", "auto")
V_SHAPED = ("zb-v", "v-half", "v-min", "dualpipev")
SCHEDULES = LOOPS + V_SHAPED
MICROBATCHES = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much to measure; `steps` maps numbers of microbatches to rounds, `activations` lists numbers of ranks."""

    memory: tuple[int, ...] = MICROBATCHES
    activations: tuple[int, ...] = (4, 8)
    steps: dict[int, int] = field(default_factory=lambda: {8: 9, 16: 5, 32: 3})
    traces: int = 7
    vocabulary_rounds: int = 7


QUICK = Effort(memory=(8,), activations=(4,), steps={8: 3}, traces=3, vocabulary_rounds=3)


def main() -> int:
    parser = make_parser(__doc__, quick="8 microbatches alone, 4 ranks alone, and fewer rounds")
    parser.add_argument("--memory", action="store_true", help="only what does not depend on other programs: no times")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else Effort()
    report = measure_programs(effort)
    if not arguments.memory:
        report |= measure_clocks(effort)
    targets = judge(report)
    if arguments.json:
        print_json(report, targets)
    else:
        print_report(report, targets)
    return exit_code(targets)


def measure_programs(effort: Effort) -> dict[str, Any]:
    """Return what follows from the compiled programs, memory and executed work, as plain data."""
    about = {"cpu_cores": os.cpu_count(), "load_before": os.getloadavg()[0]} | asdict(effort)
    with Worker("benchmarks.workers.work_r1", num_devices=8) as worker:
        rows = [_measure(worker, schedule, effort.memory) for schedule in SCHEDULES]
        activations = [measure_activations(worker, num_ranks=p) for p in effort.activations]
    return {"about": about, "rows": rows, "activations": activations}


def measure_clocks(effort: Effort) -> dict[str, Any]:
    """Return the times of actions and steps, and the verdicts on them, as plain data."""
    with Worker("benchmarks.workers.work_r1", num_devices=4) as worker:
        actions = measure_actions(worker, num_microbatches=8, rounds=effort.traces)
        times = [
            measure_times(worker, SCHEDULES, m=m, rounds=rounds, actions=actions) for m, rounds in effort.steps.items()
        ]
    with Worker("benchmarks.schedules.vocabulary", num_devices=4) as worker:
        vocabulary = measure_vocabulary(worker, m=8, rounds=effort.vocabulary_rounds, traces=effort.traces)
    return {
        "actions": actions,
        "times": times,
        "vocabulary": vocabulary,
        "verdicts": explain_actions(actions) + [line for own in times for line in compare_schedules(own, actions)],
        "vocabulary_verdict": compare_vocabularies(vocabulary),
    }


def judge(report: dict[str, Any]) -> list[Target]:
    """Compare the measurements with the targets of the schedules."""
    rows = report["rows"]
    of = {row["schedule"]: row for row in rows}
    growth = [r["temp_mib"][32] / r["temp_mib"][8] for n, r in of.items() if n != "gpipe" and 32 in r["temp_mib"]]
    targets = [Target.at_most("memory, m=32 over m=8, all but gpipe", max(growth), 1.02)] if growth else []
    targets += [
        Target.at_most("zb-h1 memory, MiB, largest over m", max(of["zb-h1"]["temp_mib"].values()), 110),
        Target.at_most("matmul work over ideal, all", max(row["matmul_over_ideal"] for row in rows), 1.0),
    ]
    for name in ("zb-h1", "interleaved-1f1b"):
        for m in (8, 32):
            ratio = of[name]["makespan"][m] / of["1f1b"]["makespan"][m]
            targets.append(Target.below(f"{name} simulated makespan over 1f1b's, F = I = W, m={m}", ratio, 1.0))
    return targets + [target for own in report["activations"] for target in judge_activations(own)]


def _measure(worker: Worker, schedule: str, counts: tuple[int, ...]) -> dict[str, Any]:
    tell(f"memory and work: {schedule}")
    timings = {m: simulate(build(schedule, m)) for m in MICROBATCHES}
    memory = {m: worker.ask("memory", schedule=schedule, remat="none", num_microbatches=m) / MIB for m in counts}
    work = worker.ask("work", schedule=schedule, remat="none", num_microbatches=8)
    return {
        "schedule": schedule,
        "chunks": num_chunks(schedule),
        "temp_mib": memory,
        "bubble_fraction": {m: timing.bubble_fraction for m, timing in timings.items()},
        "makespan": {m: timing.makespan for m, timing in timings.items()},
        "peak_in_flight": list(timings[8].peak_in_flight),
        "matmul_over_ideal": work["matmul_over_ideal"],
        "permutes": work["permutes"],
    }


if __name__ == "__main__":
    sys.exit(main())
