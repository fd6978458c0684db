"""The time that one stage takes for one microbatch. Read `simulate.py` next, which takes one per stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..meshes.arguments import check_number
from ..meshes.errors import ScheduleError
from .action import Kind


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Time of one stage for one microbatch, in any unit; a whole backward takes the sum of both gradients' times.

    Raises:
        ScheduleError: a time is negative or not finite.
    """

    forward: float
    input_grad: float
    weight_grad: float

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), error=ScheduleError)

    @property
    def total(self) -> float:
        """Time of the forward and the whole backward."""
        return self.forward + self.input_grad + self.weight_grad

    def time_of(self, kind: Kind) -> float:
        """Return the time of one kind of action."""
        if kind == "B":
            return self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad}[kind]


def is_even(stages: Sequence[StageCost]) -> bool:
    """Return whether all stages take the same time, up to rounding."""
    return all(
        math.isclose(getattr(stage, field.name), getattr(stages[0], field.name), rel_tol=1e-9)
        for stage in stages
        for field in fields(StageCost)
    )
