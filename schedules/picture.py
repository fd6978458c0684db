"""Draw a schedule as a picture: ranks down, time across, a colour per kind of action, bubbles hatched."""

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..meshes.arguments import check_choice
from ..meshes.errors import ScheduleError
from .action import Kind
from .schedule import Schedule
from .simulate import Clock, Span, Timing, simulate, time_actions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Format = Literal["png", "svg"]
"""File format of a picture."""

COLOURS: dict[Kind, tuple[float, float, float]] = {
    "F": (0.16, 0.40, 0.70),
    "B": (0.20, 0.55, 0.32),
    "I": (0.10, 0.60, 0.66),
    "W": (0.90, 0.62, 0.15),
}
"""Red, green and blue of each kind in the first chunk; later chunks are lighter."""

NAMES: dict[Kind, str] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
"""Name of each kind in a legend."""

_INCHES_PER_CELL = 0.2
_INCHES_PER_RANK = 0.42
_WIDEST = 60.0
_TALLEST = 60.0
_POINTS_PER_DIGIT = 0.62
_LIGHTEST = 0.55


def draw_picture(
    schedule: Schedule,
    *,
    format: Format = "png",  # noqa: A002
    clock: Clock = "lockstep",
    **costs: Any,
) -> bytes:
    """Return a PNG or SVG of the schedule under a clock, with bubble and peak in flight in the title.

    >>> Path("zb.svg").write_bytes(draw_picture(schedule, format="svg", clock="async", weight_grad=0.8))

    Args:
        costs: times as in `simulate`.

    Raises:
        ScheduleError: the format or the clock is unknown, or a time is negative or not finite.
    """
    check_choice("format", format, get_args(Format), error=ScheduleError)
    timing = simulate(schedule, clock=clock, **costs)
    spans = time_actions(schedule, clock=clock, **costs)
    # matplotlib takes half a second to import, and only pictures need it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    narrowest = min(length for span in spans if (length := span.end - span.start))
    width = min(_WIDEST, max(8.0, 1.2 + _INCHES_PER_CELL * timing.makespan / narrowest))
    height = min(_TALLEST, 1.5 + _INCHES_PER_RANK * schedule.num_ranks)
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "trellax", "hatch.linewidth": 0.4, "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        _draw_frame(axes, schedule, makespan=timing.makespan)
        _draw_spans(axes, schedule, spans)
        points = 72 * (width - 1.2) / timing.makespan
        rank_points = 72 * (height - 1.5) / schedule.num_ranks
        _draw_numbers(axes, schedule, spans, points_per_time=points, tallest=0.6 * rank_points)
        axes.set_title(_title(schedule, timing), fontsize=10, loc="left")
        _draw_legend(figure, schedule, kinds={span.action.kind for span in spans})
        figure.savefig(out, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return out.getvalue()


def peak_text(peak_in_flight: Iterable[int]) -> str:
    """Return the peaks rank by rank, or their range if there are more than 16 ranks."""
    peaks = list(peak_in_flight)
    return ", ".join(map(str, peaks)) if len(peaks) <= 16 else f"{min(peaks)} to {max(peaks)}"


def _title(schedule: Schedule, timing: Timing) -> str:
    chunks = f" x {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks{chunks}, {schedule.num_microbatches} microbatches, "
        f"{timing.clock} clock\n"
        f"bubble {timing.bubble_fraction:.1%}, peak in flight {peak_text(timing.peak_in_flight)}"
    )


def _draw_frame(axes: "Axes", schedule: Schedule, *, makespan: float) -> None:
    """Draw the whole time of every rank as bubble; actions are drawn over it."""
    ranks = range(schedule.num_ranks)
    axes.barh(ranks, makespan, height=0.84, color="0.94", edgecolor="0.75", hatch="////", linewidth=0)
    axes.set_xlim(0, makespan)
    axes.set_ylim(schedule.num_ranks - 0.5, -0.5)
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks], fontsize=8)
    axes.tick_params(left=False, labelsize=8)
    axes.set_xlabel("time", fontsize=8)
    axes.spines[:].set_visible(False)


def _draw_spans(axes: "Axes", schedule: Schedule, spans: Iterable[Span]) -> None:
    groups: dict[tuple[int, Kind, int], list[Span]] = {}
    for span in spans:
        chunk = schedule.placement.chunk_of(span.action.stage)
        groups.setdefault((span.rank, span.action.kind, chunk), []).append(span)
    # One collection per rank, kind and chunk: thousands of single patches take a minute.
    for (rank, kind, chunk), members in groups.items():
        axes.broken_barh(
            [(span.start, span.end - span.start) for span in members],
            (rank - 0.42, 0.84),
            facecolor=_shade(kind, chunk, schedule.num_chunks),
            edgecolor="white",
            linewidth=0.5,
        )


def _draw_numbers(
    axes: "Axes", schedule: Schedule, spans: Iterable[Span], *, points_per_time: float, tallest: float
) -> None:
    """Write the microbatch numbers in one size that fits every cell; none if they would be too small to read."""
    spans = list(spans)
    digits = len(str(schedule.num_microbatches - 1))
    narrowest = min(span.end - span.start for span in spans) * points_per_time
    size = min(9.0, tallest, 0.9 * narrowest / (digits * _POINTS_PER_DIGIT))
    if size < 3:
        return
    for span in spans:
        chunk = schedule.placement.chunk_of(span.action.stage)
        red, green, blue = _shade(span.action.kind, chunk, schedule.num_chunks)
        axes.text(
            (span.start + span.end) / 2,
            span.rank,
            str(span.action.microbatch),
            ha="center",
            va="center_baseline",
            fontsize=size,
            color="white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "black",
            clip_on=True,
        )


def _shade(kind: Kind, chunk: int, num_chunks: int) -> tuple[float, float, float]:
    white = _LIGHTEST * chunk / max(1, num_chunks - 1)
    red, green, blue = COLOURS[kind]
    return red + (1 - red) * white, green + (1 - green) * white, blue + (1 - blue) * white


def _draw_legend(figure: "Figure", schedule: Schedule, *, kinds: set[Kind]) -> None:
    from matplotlib.patches import Patch

    last = schedule.num_chunks - 1
    entries = [
        Patch(color=_shade(kind, chunk, schedule.num_chunks), label=NAMES[kind] + (f", chunk {chunk}" if last else ""))
        for kind in get_args(Kind)
        if kind in kinds
        for chunk in sorted({0, last})
    ]
    entries.append(Patch(facecolor="0.94", edgecolor="0.75", hatch="////", linewidth=0, label="bubble"))
    figure.legend(handles=entries, loc="outside lower center", ncols=len(entries), fontsize=8, frameon=False)
