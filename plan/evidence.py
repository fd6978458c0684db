"""Say how sure a plan is: the error of the planner on published rows of the same accelerator and kind.

`evidence.toml` has the errors that `benchmarks/planner` measured. An accelerator without rows has those of its nearest
relative, which is said. Read `../benchmarks/planner/PLANNER.md` for the errors of every source.
"""

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .machines.topology import Accelerator

_DATA = Path(__file__).with_name("evidence.toml")
_KIN = {
    "h200": "h100",
    "h100-pcie": "h100",
    "h100-96gb": "h100",
    "gh200": "h100",
    "gb300": "gb200",
    "b300": "b200",
    "a100-40gb": "a100",
    "a100-pcie": "a100",
}
"""Accelerators with few published rows or none, each with the relative whose rows are the nearest."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Mean error of predicted times over published rows: a share, the number of rows, where and when."""

    error: float
    rows: int
    sources: tuple[str, ...]
    date: str
    accelerator: str
    is_kin: bool

    @property
    def text(self) -> str:
        """How sure a predicted time is, in one sentence."""
        whose = f"rows on {self.accelerator}" + (", the nearest relative" if self.is_kin else "")
        told = f"{self.rows} published {whose}: {', '.join(self.sources)}; {self.date}"
        return f"Times: +-{self.error:.1%} in the mean of {told}."

    @property
    def numbers(self) -> dict[str, Any]:
        """The evidence as plain numbers and texts, for JSON."""
        return {
            "error": self.error,
            "rows": self.rows,
            "sources": list(self.sources),
            "date": self.date,
            "accelerator": self.accelerator,
            "is_nearest_relative": self.is_kin,
        }


def find_evidence(accelerator: Accelerator, *, kind: str, matmuls: str) -> Evidence | None:
    """Return the error of published rows nearest to a plan; None if there are none.

    Args:
        kind: "train", or anything else for serving.
        matmuls: `model.matmuls` of the config.
    """
    wanted = ("train" if kind == "train" else "serve", "bfloat16" if matmuls == "plain" else matmuls)
    alike = [one for one in _sources() if (one["kind"], one["matmuls"]) == wanted]
    for key in (accelerator.key, _KIN.get(accelerator.key, "")):
        found = [one for one in alike if key in one["accelerators"]]
        if found:
            return _sum_up(found, key=key, is_kin=key != accelerator.key)
    return None


def _sum_up(found: list[dict[str, Any]], *, key: str, is_kin: bool) -> Evidence:
    """Return the mean error of the rows of all sources."""
    rows = sum(one["rows"] for one in found)
    return Evidence(
        error=sum(one["error"] * one["rows"] for one in found) / rows,
        rows=rows,
        sources=tuple(one["name"] for one in found),
        date=max(one["date"] for one in found),
        accelerator=key,
        is_kin=is_kin,
    )


@lru_cache
def _sources() -> list[dict[str, Any]]:
    return tomllib.loads(_DATA.read_text())["sources"]
