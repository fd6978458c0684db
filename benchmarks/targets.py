"""Compare measurements with their targets: a table of verdicts, JSON, and the exit code of a benchmark."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from benchmarks.tables import format_table


@dataclass(frozen=True, kw_only=True)
class Target:
    """A measured number and the limit that it must keep."""

    name: str
    measured: float
    limit: float
    is_met: bool
    bound: Literal["at most", "below"] = "at most"

    @classmethod
    def at_most(cls, name: str, measured: float, limit: float) -> Self:
        """Return a target that is met if measured <= limit, up to rounding in float64."""
        is_met = measured <= limit or math.isclose(measured, limit, rel_tol=1e-9)
        return cls(name=name, measured=measured, limit=limit, is_met=is_met)

    @classmethod
    def below(cls, name: str, measured: float, limit: float) -> Self:
        """Return a target that is met if measured < limit."""
        return cls(name=name, measured=measured, limit=limit, is_met=measured < limit, bound="below")


def format_targets(targets: Sequence[Target]) -> str:
    """Return a Markdown table with the measurement, the limit and the verdict of every target."""
    rows = [("what", "measured", "limit", "verdict")]
    for target in targets:
        verdict = "met" if target.is_met else "MISSED"
        rows.append((target.name, f"{target.measured:.3f}", f"{target.bound} {target.limit:g}", verdict))
    return format_table("Targets", rows)


def print_json(report: Mapping[str, Any], targets: Sequence[Target]) -> None:
    """Print a report and its targets as JSON."""
    print(json.dumps({**report, "targets": [asdict(target) for target in targets]}, indent=2))


def exit_code(targets: Sequence[Target]) -> int:
    """Return 0 if all targets are met, else 1."""
    return 0 if all(target.is_met for target in targets) else 1
