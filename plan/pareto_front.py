"""Compute and draw the Pareto front of a search: the plans that no other beats in both the objective and memory.

Points of the front are numbered, and listed by name below the axes so that no text covers another.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plan import Plan, name_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_GB = 1e9
_LINE_INCHES = 0.17
_NEAR_POINTS = 15.0
_ROOM_ABOVE = 1.1
_WIDE_RANGE, _WIDER_RANGE = 8.0, 1000.0


@dataclass(frozen=True, kw_only=True)
class FrontAxis:
    """The horizontal axis: label with unit, value and text of a plan, and +1 if larger values are better, else -1."""

    label: str
    value: Callable[[Plan], float]
    text: Callable[[Plan], str]
    better: float = -1.0

    def cost(self, plan: Plan) -> float:
        """Return the value with a sign such that less is better."""
        return -self.better * self.value(plan)


def front_axis(objective: str) -> FrontAxis:
    """Return the axis of an objective: seconds per step, seconds per request, or tokens per second."""
    if objective in ("latency", "balanced"):
        return FrontAxis(
            label="seconds of one request", value=_latency_s, text=lambda plan: f"{_latency_s(plan):.2f} s"
        )
    if objective == "throughput":
        return FrontAxis(
            label="tokens a second of all devices",
            value=lambda plan: plan.tokens_per_s,
            text=lambda plan: f"{plan.tokens_per_s:,.0f} tokens/s",
            better=1.0,
        )
    return FrontAxis(label="seconds a step", value=lambda plan: plan.time_s, text=lambda plan: f"{plan.time_s:.3g} s")


def pareto_front(plans: Sequence[Plan], *, axis: FrontAxis) -> list[Plan]:
    """Return the plans that no other beats in both the axis and memory, best on the axis first."""
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (axis.cost(plan), plan.memory.total)):
        # From the best on the axis to the worst, the front holds each plan that needs less memory than all before it.
        if not front or plan.memory.total < front[-1].memory.total:
            front.append(plan)
    return front


def draw_front(plans: Sequence[Plan], *, objective: str, limit_bytes: float, title: str) -> bytes:
    """Return a PNG with all plans as points, the front as a numbered line, and the memory limit."""
    figure = plot_front(plans, objective=objective, limit_bytes=limit_bytes, title=title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def plot_front(plans: Sequence[Plan], *, objective: str, limit_bytes: float, title: str) -> "Figure":
    """Return the picture of `draw_front` as a matplotlib figure."""
    # matplotlib takes half a second to import, and most commands draw nothing.
    from matplotlib.figure import Figure

    axis = front_axis(objective)
    front = pareto_front(plans, axis=axis)
    names = [f"{number:>2}  {name_point(plan, axis)}" for number, plan in enumerate(front, 1)]
    list_inches = _LINE_INCHES * (len(names) + 1)
    figure = Figure(figsize=(8, 5 + list_inches), layout="constrained")
    axes, below = figure.subplots(2, 1, height_ratios=[5, list_inches])
    values, sizes = _points(plans, axis)
    axes.scatter(values, sizes, s=8, color="0.7", label="layouts")
    axes.plot(*_points(front, axis), marker="o", color="tab:blue", label="beaten by none in both")
    axes.axhline(limit_bytes / _GB, color="tab:red", linewidth=1, label="memory to stay within")
    _scale(axes.xaxis, values, axes.set_xscale)
    _scale(axes.yaxis, sizes, axes.set_yscale)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    axes.set_ylim(top=_ROOM_ABOVE * limit_bytes / _GB)
    axes.set_xlabel(axis.label)
    axes.set_ylabel("GB on the fullest device")
    axes.set_title(f"{title}\n", fontsize=11)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    below.axis("off")
    below.text(0, 1, "\n".join(names), va="top", fontsize=8, family="monospace", transform=below.transAxes)
    _number_points(figure, axes, _points(front, axis))
    return figure


def name_point(plan: Plan, axis: FrontAxis) -> str:
    """Return a plan's layout and its values on both axes as one line."""
    layout = plan.layout
    words = [name_layout(layout)]
    if plan.step is not None:
        chunks = f" x {layout.chunks}" if layout.chunks > 1 else ""
        words += [f"{layout.schedule}{chunks}"] if layout.pipe > 1 else []
        words += [f"{layout.microbatches} of {layout.sequences}", f"remat {layout.remat}"]
        words += [f"shard {layout.shard}"] if layout.zero else []
        words += [f"offload {layout.offload}"] if layout.offload != "none" else []
    return f"{', '.join(words)}: {axis.text(plan)}, {plan.memory.total / _GB:.1f} GB"


def _latency_s(plan: Plan) -> float:
    assert plan.inference is not None
    return plan.inference.latency_s


def _points(plans: Sequence[Plan], axis: FrontAxis) -> tuple[list[float], list[float]]:
    return [axis.value(plan) for plan in plans], [plan.memory.total / _GB for plan in plans]


def _scale(axis: "Axis", values: Sequence[float], set_scale: Callable[[str], None]) -> None:
    """Make an axis logarithmic if its values span more than a factor of 8, with ticks as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    if high > _WIDE_RANGE * low:
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < _WIDER_RANGE * low else (1,), numticks=12))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _number_points(figure: "Figure", axes: "Axes", points: tuple[list[float], list[float]]) -> None:
    """Number the points of the front; points that are too near for their own number share one, such as 3-5."""
    # Positions in pixels are known only after the layout has been computed.
    figure.draw_without_rendering()
    places = axes.transData.transform(list(zip(*points, strict=True))) * 72 / figure.dpi
    groups: list[list[int]] = []
    for number, (x, y) in enumerate(places):
        if groups:
            first_x, first_y = places[groups[-1][0]]
            if abs(x - first_x) < _NEAR_POINTS * 1.5 and abs(y - first_y) < _NEAR_POINTS:
                groups[-1].append(number)
                continue
        groups.append([number])
    for group in groups:
        text = str(group[0] + 1) if len(group) == 1 else f"{group[0] + 1}-{group[-1] + 1}"
        place = (points[0][group[0]], points[1][group[0]])
        axes.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
