"""Bubble fractions in closed form, as the papers state them; p ranks, m microbatches, v chunks per rank.

F, I and W are the times of a rank's forward, input gradient and weight gradient for one microbatch. Read `explain.py`
for how a simulated bubble is compared with them.
"""

from dataclasses import dataclass

from .schedule import Schedule
from .stage_cost import StageCost


@dataclass(frozen=True, kw_only=True)
class Formula:
    """A bubble fraction from the literature: its value, the formula as text, and the source.

    Args:
        premise: what the formula takes for granted and a schedule of equal times in lockstep may not keep.
    """

    bubble_fraction: float
    text: str
    source: str
    premise: str | None = None


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


def v_shaped_bubble(schedule: Schedule, _: StageCost, *, idle: float, text: str, premise: str) -> Formula:
    """Return the bubble that "Controllable Memory" states for F = I = W: a rank is idle for `idle` p microbatches."""
    p, m = schedule.num_ranks, schedule.num_microbatches
    return Formula(
        bubble_fraction=idle * p / (m + idle * p),
        text=text,
        source="Qi et al. 2024, arXiv 2405.15362",
        premise=premise,
    )


def dual_pipe_bubble(schedule: Schedule, costs: StageCost) -> Formula:
    """Return the bubble of DualPipeV: (p-1)(F&B+B-3W) for stages of half a rank, with B = I + W and F&B = F + B."""
    p, m = schedule.num_ranks, schedule.num_microbatches
    idle = (p - 1) * max(0.0, costs.forward + 2 * costs.input_grad - costs.weight_grad) / 2
    return Formula(
        bubble_fraction=idle / (m * costs.total + idle),
        text="(p-1)(F+2I-W)/2 / (m(F+I+W) + (p-1)(F+2I-W)/2)",
        source="DeepSeek 2025, README of DualPipe",
        premise="the formula is for 2p microbatches or more, and for whole backwards, which are split here",
    )
