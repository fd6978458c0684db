"""Compare a simulated bubble with the one that the literature states. Read `formula.py` for the formulas."""

from collections.abc import Sequence

from ..meshes.arguments import check_number
from ..meshes.errors import ScheduleError
from .formula import Formula
from .registry import SCHEDULES
from .schedule import Schedule
from .simulate import Clock, Timing
from .stage_cost import StageCost, is_even


def find_formula(
    schedule: Schedule, *, forward: float = 1.0, input_grad: float = 1.0, weight_grad: float = 1.0
) -> Formula | None:
    """Return the bubble fraction that the literature states for a schedule; None if its family has none.

    If F = I = W the formula of zero bubble is (p-1) / (3m+p-1), which the lockstep program reaches too.

    >>> find_formula(build_schedule("1f1b", num_ranks=4, num_microbatches=32)).text
    '(p-1) / (m+p-1)'

    Args:
        forward, input_grad, weight_grad: times as in `simulate`.

    Raises:
        ScheduleError: a time is negative or not finite.
    """
    costs = StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad)
    family = SCHEDULES.get(schedule.name)
    return family.bubble(schedule, costs) if family and family.bubble else None


def explain_difference(
    schedule: Schedule,
    formula: Formula,
    timing: Timing,
    *,
    forward: float = 1.0,
    input_grad: float = 1.0,
    weight_grad: float = 1.0,
    transfer: float = 0.0,
    stages: Sequence[StageCost] | None = None,
) -> str | None:
    """Return the reason why the simulated bubble differs from the formula's, as a phrase; None if they agree.

    >>> print(explain_difference(schedule, formula, simulate(schedule, transfer=0.1), transfer=0.1))
    the formula counts no transfer

    Raises:
        ScheduleError: a time is negative or not finite.
    """
    costs = StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad)
    check_number("transfer", transfer, error=ScheduleError)
    if abs(timing.bubble_fraction - formula.bubble_fraction) < 1e-9:
        return None
    if stages is not None and not is_even(stages):
        return "the formula is for stages of equal time"
    if transfer:
        return "the formula counts no transfer"
    if formula.premise is None and schedule.num_chunks > 1 and schedule.num_microbatches % schedule.num_ranks:
        return "the formula is for microbatches in whole groups of p; the last group leaves turns empty"
    family = SCHEDULES.get(schedule.name)
    if family and family.backward == "split" and not costs.forward == costs.input_grad == costs.weight_grad:
        return _explain_split(timing.clock, schedule.num_chunks)
    return formula.premise or "the formula is for another order of the same actions"


def _explain_split(clock: Clock, num_chunks: int) -> str:
    if clock == "lockstep":
        return "the formula is for separate programs; in lockstep a tick lasts as long as its slowest rank"
    if num_chunks > 1:
        return "this order is found for F = I = W"
    return "the formula is for a W no longer than F and I"
