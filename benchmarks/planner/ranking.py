"""Measure how well the planner ranks layouts: regret in sweeps of one model on one machine.

A sweep is a group of measured rows that differ in their layout alone. Read `accuracy.py` first, which predicts them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean

from .accuracy import Accuracy, RowError

_MODEL = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "seq", "gpus", "gpu", "precision", "recompute")
_TOLERANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Regret in the sweeps of a source: the measured time of the planner's first layout over the best, minus 1.

    `groups` counts sweeps, `within` those with a regret of at most 5%. `near_ties` is how many layouts of a sweep are
    measured within 5% of its best, that one with them, in the mean. `repeats` are the differences between the slowest
    and the fastest row of layouts that a source measured more than once, as shares of the fastest: less than these a
    regret means nothing.
    """

    source: str
    groups: int
    within: int
    mean_regret: float
    worst_regret: float
    worst: str
    near_ties: float
    repeats: Sequence[float]

    @property
    def noise(self) -> str:
        """The largest difference between rows of one layout, and of how many layouts."""
        return f"{max(self.repeats):.1%} ({len(self.repeats)})" if self.repeats else "-"


def rank_sweeps(accuracies: Sequence[Accuracy]) -> list[Ranking]:
    """Return the regret of every source that has two or more layouts of one model, number of GPUs and batch."""
    found = []
    for one in accuracies:
        if one.quantity != "step_time":
            continue
        groups = [group for group in _group(one.errors) if len(group) > 1]
        if not groups:
            continue
        regrets = [_regret(group) for group in groups]
        worst, name = max(regrets)
        values = [regret for regret, _ in regrets]
        within = sum(value <= _TOLERANCE for value in values)
        found.append(
            Ranking(
                source=one.source,
                groups=len(regrets),
                within=within,
                mean_regret=mean(values),
                worst_regret=worst,
                worst=name,
                near_ties=mean(_count_near(group) for group in groups),
                repeats=list(chain.from_iterable(_repeats(group) for group in groups)),
            )
        )
    return found


def _group(errors: Sequence[RowError]) -> list[list[RowError]]:
    """Group the rows by model, machine and batch."""
    groups: dict[tuple[str, ...], list[RowError]] = {}
    for error in errors:
        inputs = error.row.inputs
        key = tuple(str(inputs.get(name)) for name in (*_MODEL, "gbs"))
        groups.setdefault(key, []).append(error)
    return list(groups.values())


def _regret(group: Sequence[RowError]) -> tuple[float, str]:
    """Return the regret of a group and the id of the planner's first row; ties count as the fastest measured."""
    first = min(group, key=lambda error: (error.prediction.predicted, error.prediction.measured))
    best = min(error.prediction.measured for error in group)
    return first.prediction.measured / best - 1, first.row.id


def _count_near(group: Sequence[RowError]) -> int:
    """Return how many rows of a group are measured within the tolerance of its best."""
    times = [error.prediction.measured for error in group]
    return sum(time <= (1 + _TOLERANCE) * min(times) for time in times)


def _repeats(group: Sequence[RowError]) -> list[float]:
    """Return slowest over fastest, minus 1, of each layout with more than one row."""
    times: dict[str, list[float]] = {}
    for error in group:
        layout = str(sorted((name, str(value)) for name, value in error.row.inputs.items()))
        times.setdefault(layout, []).append(error.prediction.measured)
    return [max(own) / min(own) - 1 for own in times.values() if len(own) > 1]
