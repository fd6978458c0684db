"""The picture of a search: time against memory, and the front that no other plan beats in both."""

import io
from collections.abc import Sequence

from .plans import Plan, name_layout

_GB = 1e9
_LABEL_SHARE = 0.06


def pareto_front(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other beats in both time and memory, fastest first."""
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.time_s, plan.memory.total)):
        if not front or plan.memory.total < front[-1].memory.total:
            front.append(plan)
    return front


def draw_front(plans: Sequence[Plan], *, limit_bytes: float, title: str) -> bytes:
    """Return a PNG of all plans as points, the front as a line, and the memory limit.

    Time is that of a training step, or of a decoded token.
    """
    # matplotlib takes half a second to import, and few calls draw.
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    front = pareto_front(plans)
    axes.scatter([p.time_s for p in plans], [p.memory.total / _GB for p in plans], s=8, color="0.7", label="layouts")
    axes.plot(
        [p.time_s for p in front],
        [p.memory.total / _GB for p in front],
        marker="o",
        color="tab:blue",
        label="beaten by none in both",
    )
    for plan in _spread(front):
        axes.annotate(
            name_layout(plan.layout) + (f", remat {plan.layout.remat}" if plan.step else ""),
            (plan.time_s, plan.memory.total / _GB),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.axhline(limit_bytes / _GB, color="tab:red", linewidth=1, label="memory that may be used")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("seconds a step" if any(plan.step for plan in plans) else "seconds a token")
    axes.set_ylabel("GB on the fullest device")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _spread(front: Sequence[Plan]) -> list[Plan]:
    """Those of the front whose names have room above each other."""
    if not front:
        return []
    room = _LABEL_SHARE * (front[0].memory.total - front[-1].memory.total)
    named: list[Plan] = []
    for plan in front:
        if not named or named[-1].memory.total - plan.memory.total >= room:
            named.append(plan)
    return named
