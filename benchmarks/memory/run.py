"""Compare the planner's memory with that of compiled programs, for H200 that need not be there.

Command:  python benchmarks/memory/run.py FILE [--kind KIND] [--compiled] [--json]
Time: about a minute of one core a case. It needs the extra `cuda` and Python 3.12, and no GPU.

Cases are compiled one at a time, each in a process of its own, and what `trellax inspect` reports of a case is appended
to FILE, one JSON object a line. A case that is there is not compiled again: delete its line where the code of a step
has changed. With --compiled nothing is compiled, and the tables are of what the file has: a change of the planner is
compared in seconds. The larger programs that RESULTS.md has are compared too (`recorded.py`). `total` is the whole
program: arguments, outputs that reuse none, temporary arrays, and code.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

# Run as a script, this file finds the folder `benchmarks` at the root of the repository.
sys.path.insert(0, str(Path(__file__).parents[2]))

from trellax.configs.layout import layout_of, question_of
from trellax.configs.run_config import RunConfig
from trellax.meshes import TrellaxError
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.machines.topology import read_topology

from benchmarks.arguments import make_parser
from benchmarks.memory.cases import ACCELERATOR, CASES, Case
from benchmarks.memory.recorded import read_recorded
from benchmarks.tables import Rows, format_table
from benchmarks.targets import Target, exit_code, format_targets, print_json

LIMIT = 0.03
"""Largest error that is asked for, as a share of the program's memory."""

XLA_FLAGS = "--xla_backend_optimization_level=0"
"""LLVM's passes take half of the time of compiling, and have no part in which buffers a program has."""

_GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Row:
    """Bytes of a case, of the compiled program and planned; or why one of them is not known."""

    kind: str
    case: str
    compiled: int = 0
    planned: float = 0.0
    failure: str = ""

    @property
    def error(self) -> float:
        """Planned over compiled, minus 1."""
        return self.planned / self.compiled - 1


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what the file lacks, print the tables, and return the exit code."""
    parser = make_parser(__doc__)
    parser.add_argument("file", metavar="FILE", type=Path, help="what was compiled, one JSON object a line")
    parser.add_argument("--kind", choices=sorted({case.kind for case in CASES}), help="one kind of layout alone")
    parser.add_argument("--compiled", action="store_true", help="compile nothing; compare what the file has")
    arguments = parser.parse_args(argv)
    cases = [case for case in CASES if arguments.kind in (None, case.kind)]
    found = read_compiled(arguments.file)
    if not arguments.compiled:
        found |= _compile_all([case for case in cases if case.name not in found], arguments.file)
    rows = [compare(case, found[case.name]) for case in cases if case.name in found]
    if arguments.kind is None:
        rows += compare_recorded()
    targets = targets_of(rows)
    if arguments.json:
        print_json({"rows": [asdict(row) for row in rows]}, targets)
    else:
        print(format_table("By kind", list_kinds(rows)), format_table("All cases", list_cases(rows)), sep="\n")
        print(format_targets(targets))
    return exit_code(targets)


def read_compiled(file: Path) -> dict[str, dict[str, object]]:
    """Return what was compiled by the name of the case; the last line of a case counts."""
    lines = file.read_text().splitlines() if file.exists() else []
    return {line["case"]: line for line in map(json.loads, lines)}


def _compile_all(cases: Sequence[Case], file: Path) -> dict[str, dict[str, object]]:
    found = {}
    for number, case in enumerate(cases, 1):
        print(f"{number}/{len(cases)} {case.name}", file=sys.stderr)
        found[case.name] = compile_case(case)
        with file.open("a") as out:
            out.write(json.dumps(found[case.name]) + "\n")
    return found


def compile_case(case: Case) -> dict[str, object]:
    """Return what `trellax inspect` reports of a case, in a process of its own: jax starts with one target."""
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    path = os.pathsep.join([str(root / ".src"), os.environ.get("PYTHONPATH", "")])
    target = f"{ACCELERATOR}:{case.load().mesh.num_devices}"
    done = subprocess.run(
        [sys.executable, "-m", "trellax", "inspect", case.config, "--target", target, *case.words, "--json"],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"case": case.name, "error": done.stderr.strip().splitlines()[0]}
    report = json.loads(done.stdout)
    return {"case": case.name, "memory_bytes": report["memory_bytes"], "verdict": report["verdict"]}


def planned_bytes(case: Case) -> float:
    """Return the memory of the fullest device by the planner.

    Raises:
        TrellaxError: the planner refuses the case.
    """
    return _planned(case.load(), ACCELERATOR)


def _planned(config: RunConfig, accelerator: str) -> float:
    num_devices = config.mesh.num_devices
    question = question_of(config, topology=read_topology(f"{accelerator}x{num_devices}"))
    layout = layout_of(config, num_devices=num_devices)
    assert question.runtime is not None
    ranks = step_memory(config.model, layout=layout, num_tokens=question.num_tokens, runtime=question.runtime)
    return fullest(ranks).total


def compare(case: Case, compiled: dict[str, object]) -> Row:
    """Return the bytes of a case, compiled and planned."""
    failure, memory = str(compiled.get("error", "")), compiled.get("memory_bytes")
    if not failure and isinstance(memory, dict):
        try:
            planned = planned_bytes(case)
            return Row(kind=case.kind, case=case.name, compiled=memory["total"], planned=planned)
        except TrellaxError as error:
            failure = str(error).splitlines()[0]
    return Row(kind=case.kind, case=case.name, failure=failure)


def compare_recorded() -> list[Row]:
    """Return the bytes of the larger programs that RESULTS.md has, and of their plans."""
    return [
        Row(kind="large, recorded", case=name, compiled=round(num_bytes), planned=_planned(config, accelerator))
        for name, (config, accelerator, num_bytes) in read_recorded().items()
    ]


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Return how many cases are farther off than asked for, or have no number at all, and that there are 40."""
    far = sum(1 for row in rows if row.failure or abs(row.error) > LIMIT)
    return [
        Target.at_most(f"cases more than {LIMIT:.0%} off", far, 0),
        Target.at_most("cases missing of 40", max(0, 40 - len(rows)), 0),
    ]


def list_kinds(rows: Sequence[Row]) -> Rows:
    """Return a line for each kind of layout: cases, those within the limit, mean and worst error."""
    lines: Rows = [("kind", "cases", f"within {LIMIT:.0%}", "mean", "worst")]
    for kind in [*dict.fromkeys(row.kind for row in rows), "all"]:
        own = [row for row in rows if kind in (row.kind, "all")]
        errors = [row.error for row in own if not row.failure]
        within = sum(abs(error) <= LIMIT for error in errors)
        numbers = (f"{mean(map(abs, errors)):.1%}", f"{max(errors, key=abs):+.1%}") if errors else ("-", "-")
        lines.append((kind, str(len(own)), str(within), *numbers))
    return lines


def list_cases(rows: Sequence[Row]) -> Rows:
    """Return a line for each case."""
    lines: Rows = [("case", "compiled, GB", "planned, GB", "error")]
    for row in rows:
        if row.failure:
            lines.append((row.case, "-", "-", row.failure))
            continue
        lines.append((row.case, f"{row.compiled / _GB:.2f}", f"{row.planned / _GB:.2f}", f"{row.error:+.1%}"))
    return lines


if __name__ == "__main__":
    sys.exit(main())
