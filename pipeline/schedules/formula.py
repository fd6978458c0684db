"""The bubble that the papers promise, beside which a simulated one is shown, and why the two may differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...meshes.arguments import check_number
from ...meshes.errors import ScheduleError
from .grid import Schedule
from .simulate import Clock, Timing
from .stage_cost import StageCost, is_even

_P_OF_M = ("(p-1) / (m+p-1)", "Narayanan et al. 2021, section 2.2")
_HALVES = "(p-1)(F+I-W) / (m(F+I+W) + (p-1)(F+I-W))"
_FORMULAS = {
    "naive": ("(p-1) / p", "one rank works at a time"),
    "gpipe": ("(p-1) / (m+p-1)", "Huang et al. 2019, section 2.3"),
    "1f1b": _P_OF_M,
    "interleaved-1f1b": ("(p-1) / (v m+p-1)", _P_OF_M[1]),
    "zb-h1": (_HALVES, "Qi et al. 2024, Table 2"),
    "interleaved-zb-h1": (
        "(p-1)(F+I-W)/v / (m(F+I+W) + (p-1)(F+I-W)/v)",
        "Qi et al. 2024, Table 2, with chunks as in Narayanan et al. 2021",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A textbook bubble: the idle share of all ranks' time, how it is written and who states it."""

    bubble_fraction: float
    text: str
    source: str


def find_formula(
    schedule: Schedule, *, forward: float = 1.0, input_grad: float = 1.0, weight_grad: float = 1.0
) -> Formula | None:
    """Return the textbook formula of a named schedule, None of any other.

    With equal costs the zero-bubble formula is (p-1) / (3m+p-1), which the lockstep program reaches too.

    >>> find_formula(build_schedule("1f1b", num_ranks=4, num_microbatches=32)).text
    '(p-1) / (m+p-1)'

    Args:
        forward, input_grad, weight_grad: costs as in `simulate`.
    """
    StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad)  # refuses what is no time
    if schedule.name not in _FORMULAS:
        return None
    p, m, v = schedule.num_ranks, schedule.num_microbatches, schedule.num_chunks
    text, source = _FORMULAS[schedule.name]
    if schedule.name == "naive":
        return Formula(bubble_fraction=(p - 1) / p, text=text, source=source)
    if not schedule.name.endswith("zb-h1"):
        return Formula(bubble_fraction=(p - 1) / (v * m + p - 1), text=text, source=source)
    if m < p:
        share = "" if v == 1 else "/v"
        idle_text = f"((p-1)(F+I) - (m-1)W){share}"
        text = f"{idle_text} / (m(F+I+W) + {idle_text}) for m < p"
        source = source.replace("Table 2", "Appendix H")
    # Fewer microbatches than ranks have fewer weight gradients to fill the bubble with.
    gaps = (p - 1) * (forward + input_grad) - (min(m, p) - 1) * weight_grad
    idle = max(0.0, gaps) / v
    return Formula(bubble_fraction=idle / (m * (forward + input_grad + weight_grad) + idle), text=text, source=source)


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
    """Return in a phrase why the simulated bubble is not the formula's, None where they agree.

    >>> print(explain_difference(schedule, formula, simulate(schedule, transfer=0.1), transfer=0.1))
    the formula counts no transfer
    """
    StageCost(forward=forward, input_grad=input_grad, weight_grad=weight_grad)  # refuses what is no time
    check_number("transfer", transfer, error=ScheduleError)
    if abs(timing.bubble_fraction - formula.bubble_fraction) < 1e-9:
        return None
    if stages is not None and not is_even(stages):
        return "the formula is for stages of equal time"
    if transfer:
        return "the formula counts no transfer"
    if schedule.num_chunks > 1 and schedule.num_microbatches % schedule.num_ranks:
        return "the formula is for microbatches in whole groups of p; the last group leaves turns empty"
    if schedule.name.endswith("zb-h1") and not forward == input_grad == weight_grad:
        return _explain_halves(timing.clock, schedule.num_chunks)
    return "the formula is for another order of the same actions"


def _explain_halves(clock: Clock, num_chunks: int) -> str:
    if clock == "lockstep":
        return "the formula is for separate programs; in lockstep a tick lasts as long as its slowest rank"
    if num_chunks > 1:
        return "this order is found for F = I = W"
    return "the formula is for a W no longer than F and I"
