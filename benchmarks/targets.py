"""Targets of the benchmarks, and the Markdown tables in which they print their numbers."""

import math
from dataclasses import dataclass
from typing import Literal, Self

from rich.box import MARKDOWN
from rich.table import Table

MIB = 2**20


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


def make_table(title: str, *columns: str) -> Table:
    """Return an empty Markdown table whose columns after the first are aligned right."""
    table = Table(title=title, box=MARKDOWN)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table
