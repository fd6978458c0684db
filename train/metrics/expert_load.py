"""Say at the end of a run that loads of experts were uneven: past its room an expert takes time or loses tokens.

The peak of a step is a mean over its devices and microbatches. So its expert has as much on one of them at least, and
that device has gone through as many rounds, up to rounding. Read `../../layers/experts/moe.py` for rooms and rounds.
"""

import math
from collections.abc import Mapping, Sequence

from ...layers import ModelConfig

_LAST = 10
"""Lines of the log that count: loads of the first steps say little."""


def explain_load(lines: Sequence[Mapping[str, float]], model: ModelConfig) -> str:
    """Return what uneven loads cost and how to even them, "" where every expert has room for its load.

    Args:
        lines: those of metrics.jsonl.
    """
    last = [line for line in lines if "expert_peak" in line][-_LAST:]
    if not last:
        return ""
    peak, room = sum(line["expert_peak"] for line in last) / len(last), model.expert_capacity
    # Not a number in steps that were skipped.
    if not peak > room:
        return ""
    if model.expert_overflow == "drop":
        cost = f"{sum(line['dropped'] for line in last) / len(last):.1%} of pairs of a token and an expert are dropped"
    else:
        cost = f"it takes about {math.ceil(peak / room)} rounds, and its group waits"
    even = (
        "set model.router_bias='on', or raise balance_loss"
        if model.router_bias == "off"
        else "raise model.balance_loss"
    )
    return (
        f"experts   the most loaded one of a layer has {peak:.2f} times the mean, and room for {room:g} "
        f"(model.expert_capacity): {cost}.\n"
        f"          Fix: {even}; or make room: model.expert_capacity={math.ceil(10 * peak) / 10:g}."
    )
