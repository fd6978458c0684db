"""Compile training steps of large models for absent GPUs, and compare their modelled times before and after.

Command:  python benchmarks/gpu_programs/run.py [--quick] [--json]
Time: about 15 minutes on two cores, 2 with --quick. It needs the extra `cuda` and Python 3.12, and no GPU.

"Before" has no sequence parallelism, weights on every data shard, full rematerialisation and no steady state. "After"
is the fastest of a few settings (`cases.py`) that is within XLA's memory limit. Bytes and counts are those of the
compiled programs; seconds are those of the model in `programs/timeline/efficiencies.py`, the same for all of them.
Products are compiled for cuBLAS, since XLA can measure which kernels are fastest only where there is a GPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.arguments import make_parser
from benchmarks.gpu_programs.cases import CASES, PLAIN, Case, Settings, label, overrides
from benchmarks.tables import Rows, format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

PEAK_FLOPS_PER_S = 989.4e12
"""bfloat16 peak of H100 and H200, for the share of model flops (MFU)."""

XLA_FLAGS = "--xla_gpu_enable_triton_gemm=false"
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """A compiled step: its settings, memory, modelled seconds, or the error if it does not compile."""

    case: str
    when: str
    settings: str
    memory_bytes: int = 0
    verdict: str = ""
    times_s: dict[str, float] | None = None
    exposed_share: dict[str, float] | None = None
    mfu: float = 0.0
    error: str = ""

    @property
    def total_s(self) -> float:
        """Seconds of the step; infinite if there is none."""
        return self.times_s["total_s"] if self.times_s else float("inf")


def main() -> None:
    parser = make_parser(__doc__, quick="8B on 8 GPUs only, with two candidates")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.config == "llama3-8b-8gpu"] if arguments.quick else CASES
    found: list[tuple[Case, list[Row]]] = []
    for case in cases:
        candidates = case.candidates[:2] if arguments.quick else case.candidates
        settings = [("before", case.before or PLAIN), *(("candidate", one) for one in candidates)]
        found.append((case, [compile_step(case, when, one) for when, one in settings]))
    targets = [target for case, rows in found for target in targets_of(case, rows)]
    if arguments.json:
        print_json({"rows": [asdict(row) for _, rows in found for row in rows]}, targets)
    else:
        print_report(found, targets)
    sys.exit(exit_code(targets))


def compile_step(case: Case, when: str, settings: Settings) -> Row:
    """Compile one step in a process of its own, since jax starts with one target, and return what it costs."""
    words = [*case.config.split(), "--target", case.target, *overrides(settings), "--json"]
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    path = os.pathsep.join([str(root / ".src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "trellax", "inspect", *words]
    print(f"{case.name}: {label(settings)}", file=sys.stderr)
    done = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return Row(case=case.name, when=when, settings=label(settings), error=done.stderr.strip().splitlines()[0])
    report: dict[str, Any] = json.loads(done.stdout)
    times_s = report["step_time_s"]
    return Row(
        case=case.name,
        when=when,
        settings=label(settings),
        memory_bytes=report["memory_bytes"]["total"],
        verdict=report["verdict"],
        times_s=times_s,
        exposed_share={row["axis"]: row["share"] for row in report["exposed"]},
        mfu=report["model_flops"] / times_s["total_s"] / PEAK_FLOPS_PER_S,
    )


def best_of(rows: list[Row]) -> Row:
    """Return the fastest of the candidates that are within XLA's limit, or the fastest of all if none is."""
    candidates = [row for row in rows if row.when == "candidate"]
    return min([row for row in candidates if row.verdict == "fits"] or candidates, key=lambda row: row.total_s)


def targets_of(case: Case, rows: list[Row]) -> list[Target]:
    """Return what the issue asks of a case: seconds of the best step, or memory."""
    best = best_of(rows)
    if case.limit_s is None:
        return [Target.at_most(f"{case.name}: GB of memory", best.memory_bytes / 1e9, 80.0)]
    return [Target.at_most(f"{case.name}: modelled seconds", best.total_s, case.limit_s)]


def print_report(found: list[tuple[Case, list[Row]]], targets: list[Target]) -> None:
    """Print the table of before and after, all candidates, and the targets, in Markdown."""
    print(format_table("Before and after", [HEAD, *(line for _, rows in found for line in two_of(rows))]))
    print(format_table("All candidates", [HEAD, *(line_of(row, row.when) for _, rows in found for row in rows[1:])]))
    print(format_table("Share of bytes that enclose no product", exposed_rows(found)))
    print(format_targets(targets))


HEAD = (
    "step",
    "",
    "settings",
    "GiB",
    "verdict",
    "step s",
    "waiting",
    "exposed",
    "products",
    "vector",
    "launches",
    "MFU %",
)


def two_of(rows: list[Row]) -> Rows:
    """Return the lines of a step before and after."""
    return [line_of(rows[0], "before"), line_of(best_of(rows), "after")]


def exposed_rows(found: list[tuple[Case, list[Row]]]) -> Rows:
    """Return the exposed share of every axis, before and after."""
    named = [(row, when) for _, rows in found for row, when in ((rows[0], "before"), (best_of(rows), "after"))]
    axes = list(dict.fromkeys(axis for row, _ in named for axis in row.exposed_share or {}))
    lines: Rows = [("step", "", *axes)]
    for row, when in named:
        shares = row.exposed_share or {}
        lines.append((row.case, when, *(f"{shares[axis]:.0%}" if axis in shares else "" for axis in axes)))
    return lines


def line_of(row: Row, when: str) -> tuple[str, ...]:
    """Return a line of the table."""
    if row.times_s is None:
        return (row.case, when, row.settings, "", row.error, *[""] * 7)
    times = [row.times_s[name] for name in ("waiting_s", "exposed_s", "matrix_s", "vector_s", "launches_s")]
    numbers = [f"{row.total_s:.2f}", *(f"{time_s:.2f}" for time_s in times), f"{100 * row.mfu:.0f}"]
    return (row.case, when, row.settings, f"{row.memory_bytes / GIB:.1f}", row.verdict, *numbers)


if __name__ == "__main__":
    main()
