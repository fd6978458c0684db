"""Bubble fractions in closed form, as the papers state them; p ranks, m microbatches, v chunks per rank.

F, I and W are the times of a rank's forward, input gradient and weight gradient for one microbatch. Read `explain.py`
for how a simulated bubble is compared with them.
"""

from dataclasses import dataclass

from .schedule import Schedule
from .stage_cost import StageCost


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A bubble fraction from the literature: its value, the formula as text, and the source."""

    bubble_fraction: float
    text: str
    source: str


def one_rank_bubble(schedule: Schedule, _: StageCost) -> Formula:
    """Return the bubble of schedules in which one rank works at a time."""
    p = schedule.num_ranks
    return Formula(bubble_fraction=(p - 1) / p, text="(p-1) / p", source="one rank works at a time")


def fill_drain_bubble(schedule: Schedule, _: StageCost, *, text: str, source: str) -> Formula:
    """Return the bubble of filling and draining the pipeline with whole backwards: (p-1) / (v m+p-1)."""
    p, m, v = schedule.num_ranks, schedule.num_microbatches, schedule.num_chunks
    return Formula(bubble_fraction=(p - 1) / (v * m + p - 1), text=text, source=source)


def split_backward_bubble(schedule: Schedule, costs: StageCost, *, text: str, source: str) -> Formula:
    """Return the bubble of ZB-H1 and its interleaved form (Qi et al. 2024, Table 2; Appendix H for m < p).

    Each of the p-1 gaps of F+I is filled by a weight gradient, as far as there are microbatches:

        idle = ((p-1)(F+I) - (min(m, p)-1) W) / v,    bubble = idle / (m(F+I+W) + idle)
    """
    p, m, v = schedule.num_ranks, schedule.num_microbatches, schedule.num_chunks
    if m < p:
        share = "" if v == 1 else "/v"
        idle_text = f"((p-1)(F+I) - (m-1)W){share}"
        text = f"{idle_text} / (m(F+I+W) + {idle_text}) for m < p"
        source = source.replace("Table 2", "Appendix H")
    gaps = (p - 1) * (costs.forward + costs.input_grad) - (min(m, p) - 1) * costs.weight_grad
    idle = max(0.0, gaps) / v
    return Formula(bubble_fraction=idle / (m * costs.total + idle), text=text, source=source)
