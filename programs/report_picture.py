"""Draw a report: memory by purpose against the device's capacity, traffic by axis against the minimum."""

import io
from typing import TYPE_CHECKING

from .report import ProgramReport
from .report_tables import format_bytes
from .traffic import EVERY_KIND

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "parameters": (0.16, 0.40, 0.70),
    "gradients": (0.20, 0.55, 0.32),
    "optimizer": (0.90, 0.62, 0.15),
    "activations": (0.10, 0.60, 0.66),
    "temporary": (0.55, 0.55, 0.60),
}
"""Colour of each purpose of memory, as red, green and blue."""

_SENT = COLOURS["parameters"]
_EXCESS = (0.80, 0.25, 0.20)
_EXPOSED = COLOURS["optimizer"]
_GIBI = 2**30
_MEBI = 2**20
# Least share of the bar's width in which a number is readable.
_NARROWEST_LABEL = 0.06
# Least share of the capacity at which the bar has room for the capacity too.
_SMALLEST_SHARE = 0.1


def draw_report(report: ProgramReport) -> bytes:
    """Return a PNG of the report's memory and traffic.

    >>> Path("step.png").write_bytes(draw_report(report))
    """
    # matplotlib takes half a second to import.
    from matplotlib.figure import Figure

    num_axes = len({row.axis for row in report.traffic})
    figure = Figure(figsize=(9.0, 3.2 + 0.42 * max(1, num_axes)), layout="constrained")
    memory, traffic = figure.subplots(2, 1, height_ratios=[1.5, max(1.0, 0.55 * num_axes)])
    _draw_memory(memory, report)
    _draw_traffic(traffic, report)
    bubble = "" if report.bubble_fraction is None else f", bubble {report.bubble_fraction:.1%}"
    figure.suptitle(f"{report.target}{bubble}", fontsize=10, x=0.01, ha="left")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _draw_memory(axes: "Axes", report: ProgramReport) -> None:
    """Draw one bar of memory by purpose, with lines for the capacity and for XLA's limit."""
    memory = report.memory
    # On an almost empty device the parts would be too small to see: the title has the capacity, the bar leaves it out.
    has_room = memory.total > _SMALLEST_SHARE * (memory.capacity or 0)
    widest = max(memory.total, memory.capacity or 0) if has_room else memory.total
    unit, name = (_GIBI, "GiB") if widest >= _GIBI else (_MEBI, "MiB")
    start = 0
    for purpose, size in memory.classes.items():
        label = f"{purpose} {format_bytes(size)}"
        axes.barh(0, size / unit, left=start / unit, color=COLOURS[purpose], edgecolor="white", label=label)
        if size > _NARROWEST_LABEL * widest:
            axes.text(
                (start + size / 2) / unit, 0, f"{size / unit:.1f}", ha="center", va="center", color="white", fontsize=8
            )
        start += size
    verdict = f"memory per device: {format_bytes(memory.total)}"
    if memory.capacity is not None and memory.free is not None:
        if has_room:
            axes.axvline(memory.capacity / unit, color="black", linewidth=2.5)
        rest = "left" if memory.free >= 0 else "too much"
        verdict += f" of {format_bytes(memory.capacity)}, {format_bytes(abs(memory.free))} {rest}"
        if memory.verdict == "over XLA's limit" and memory.limit is not None:
            axes.axvline(memory.limit / unit, color="black", linestyle="--", linewidth=1.5)
            verdict += f"; over XLA's limit of {format_bytes(memory.limit)}"
    axes.set_title(verdict, fontsize=9, loc="left")
    axes.set_xlim(0, 1.02 * widest / unit)
    axes.set_ylim(-0.5, 0.5)
    axes.set_yticks([])
    axes.set_xlabel(name, fontsize=8)
    _finish(axes)
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper left", bbox_to_anchor=(0, -0.32))


def _draw_traffic(axes: "Axes", report: ProgramReport) -> None:
    """Draw the bytes sent over each axis, in red above the minimum."""
    rows = [row for row in report.traffic if row.kind == EVERY_KIND]
    exposed = {row.axis: row.exposed_bytes for row in report.schedule.exposed}
    title = "sent per device and step; black: the minimum" + ("; amber: encloses no product" if exposed else "")
    axes.set_title(title, fontsize=9, loc="left")
    _finish(axes)
    if not rows:
        axes.text(0.5, 0.5, "nothing is sent", ha="center", fontsize=9, transform=axes.transAxes)
        return
    widest = max(max(row.bytes, row.minimum_bytes or 0) for row in rows)
    unit, name = (_GIBI, "GiB") if widest >= _GIBI else (_MEBI, "MiB")
    for place, row in enumerate(rows):
        needed = row.bytes if row.minimum_bytes is None else min(row.bytes, row.minimum_bytes)
        axes.barh(place, needed / unit, color=_SENT, height=0.6)
        axes.barh(place, (row.bytes - needed) / unit, left=needed / unit, color=_EXCESS, height=0.6)
        # Along the lower edge, what no product hides.
        axes.barh(place + 0.24, exposed.get(row.axis, 0.0) / unit, color=_EXPOSED, height=0.12)
        if row.minimum_bytes:
            axes.plot([row.minimum_bytes / unit] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
        ratio = "" if row.ratio is None else f", {row.ratio:.2f} x"
        end = max(row.bytes, row.minimum_bytes or 0) / unit
        axes.text(end + 0.01 * widest / unit, place, f"{format_bytes(row.bytes)}{ratio}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.axis for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.25 * widest / unit)
    axes.set_xlabel(name, fontsize=8)


def _finish(axes: "Axes") -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
