"""Write the page of evidence: every source, its rows, errors and worst row, what was fitted, and a picture of it all.

`run.py --write docs` calls this; the page is `concepts/evidence.md`, the picture `pictures/planner-errors.svg`.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.planner.accuracy import CALIBRATION, Accuracy, RowError
from benchmarks.planner.ranking import Ranking
from benchmarks.planner.runtime_case import is_recent

_PICTURE = "pictures/planner-errors.svg"
_WIDEST = 0.6
_INTRO = """# How far off the planner is

Written by `python benchmarks/planner/run.py FOLDER --write docs`, where FOLDER has published measurements, one TOML
file a source. None is this project's. An error is predicted over measured, minus 1; the mean is of its size. Rows on
which a constant was fitted are counted apart, and `held out` is the mean of the others. Mechanisms were chosen with all
rows in view.

![Range, middle and mean of the errors of every source](../pictures/planner-errors.svg)
"""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A class of rows, and the mean error that is asked of those that are held out."""

    name: str
    target: float


GOALS = (
    Goal(name="dense bfloat16 steps, H100 and newer", target=0.05),
    Goal(name="fp8 steps", target=0.10),
    Goal(name="mxfp8 steps", target=0.10),
    Goal(name="nvfp4 steps", target=0.10),
    Goal(name="LoRA steps", target=0.15),
    Goal(name="decoding", target=0.09),
    Goal(name="peak memory", target=0.08),
)
"""The classes of rows that have a goal, in the order of the page."""


def write_evidence(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking], *, docs: Path) -> tuple[Path, Path]:
    """Write the page and its picture below a folder of documentation, and return their paths."""
    page, picture = docs / "concepts" / "evidence.md", docs / _PICTURE
    for path in (page, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(format_page(accuracies, rankings))
    picture.write_bytes(draw_errors(accuracies))
    return page, picture


def format_page(accuracies: Sequence[Accuracy], rankings: Sequence[Ranking]) -> str:
    """Return the page of evidence in Markdown."""
    skipped = {one.source: one.skipped for one in accuracies}
    reasons = [(source, str(count), why) for source, counts in skipped.items() for why, count in counts.items()]
    fitted = [(source, part or "all", what) for source, parts in CALIBRATION.items() for part, what in parts.items()]
    parts = [
        _INTRO,
        "## By kind\n\n" + _table(("kind", "goal", "rows", "held out", "worst", "row"), _list_goals(accuracies)),
        "## By source\n\n"
        + _table(
            ("source", "quantity", "rows", "fitted", "mean", "bias", "held out", "worst", "row"),
            (_source_line(one) for one in accuracies if one.used),
        ),
        "## What was fitted\n\nAll other rows are held out.\n\n" + _table(("source", "rows with", "constants"), fitted),
        "## How layouts are ranked\n\nOf every sweep: the measured time of the layout that the planner puts first, "
        "over the best one measured.\nLayouts of a sweep that are measured within 5% of its best are near ties. "
        "Noise is the largest difference between rows of one layout, with the number of layouts that have several.\n\n"
        + _table(
            ("source", "sweeps", "within 5%", "mean", "worst", "near ties", "noise", "row"),
            map(_ranking_line, rankings),
        ),
        "## What is not predicted\n\n" + _table(("source", "rows", "reason"), reasons),
        "Why it falls short where it does: `benchmarks/planner/PLANNER.md`.",
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _ranking_line(one: Ranking) -> tuple[object, ...]:
    regrets = f"{one.mean_regret:+.1%}", f"{one.worst_regret:+.1%}"
    return one.source, one.groups, one.within, *regrets, f"{one.near_ties:.1f}", one.noise, one.worst


def errors_by_goal(accuracies: Iterable[Accuracy]) -> dict[str, list[RowError]]:
    """Return the errors of held-out rows by the name of their goal."""
    found: dict[str, list[RowError]] = {goal.name: [] for goal in GOALS}
    for one in accuracies:
        for error in one.errors:
            name = _goal_of(error)
            if name and not error.is_calibrating:
                found[name].append(error)
    return found


def draw_errors(accuracies: Sequence[Accuracy]) -> bytes:
    """Return an SVG with a line for each source and quantity: all errors thin, the middle 80% thick, the mean a dot."""
    # matplotlib takes half a second to import, and only the picture needs it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [one for one in accuracies if one.used]
    out = io.BytesIO()
    with rc_context({"svg.hashsalt": "trellax", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9.0, 0.8 + 0.2 * len(shown)), layout="constrained")
        axes = figure.subplots()
        for place, one in enumerate(shown):
            errors = sorted(max(-_WIDEST, min(_WIDEST, error.prediction.error)) for error in one.errors)
            tenth = len(errors) // 10
            colour = "0.6" if one.calibrating == one.used else (0.16, 0.40, 0.70)
            axes.plot([errors[0], errors[-1]], [place, place], color=colour, linewidth=0.8)
            axes.plot([errors[tenth], errors[-1 - tenth]], [place, place], color=colour, linewidth=4, alpha=0.5)
            axes.plot([max(-_WIDEST, min(_WIDEST, one.bias))], [place], "o", color=colour, markersize=4)
        axes.axvline(0, color="0.3", linewidth=0.6)
        axes.axvspan(-0.1, 0.1, color="0.93", zorder=0)
        axes.set_yticks(range(len(shown)), [f"{one.source}, {one.quantity} ({one.used})" for one in shown], fontsize=7)
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.set_xlim(-1.02 * _WIDEST, 1.02 * _WIDEST)
        ticks = [share / 10 for share in range(-6, 7, 2)]
        axes.set_xticks(ticks, [f"{tick:+.0%}" if tick else "0" for tick in ticks], fontsize=7)
        axes.set_xlabel("predicted over measured, minus 1; grey: all rows fitted", fontsize=8)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _goal_of(error: RowError) -> str | None:
    """Return the name of the goal that a prediction counts for; None if it has none."""
    quantity, row = error.prediction.quantity, error.row
    if quantity.startswith("memory"):
        return "peak memory"
    if quantity == "decode":
        return "decoding"
    if quantity == "step_time lora":
        return "LoRA steps"
    for name in ("mxfp8", "nvfp4", "fp8"):
        if quantity == f"step_time {name}":
            return f"{name} steps"
    if quantity == "step_time" and is_recent(row):
        return "dense bfloat16 steps, H100 and newer"
    return None


def _list_goals(accuracies: Sequence[Accuracy]) -> Iterable[tuple[object, ...]]:
    found = errors_by_goal(accuracies)
    for goal in GOALS:
        errors = found[goal.name]
        if not errors:
            yield (goal.name, f"{goal.target:.0%}", 0, "-", "-", "-")
            continue
        worst = max(errors, key=lambda error: abs(error.prediction.error))
        yield (
            goal.name,
            f"{goal.target:.0%}",
            len(errors),
            f"{mean(abs(error.prediction.error) for error in errors):.1%}",
            f"{worst.prediction.error:+.1%}",
            f"{worst.row.source}: {worst.row.id}",
        )


def _source_line(one: Accuracy) -> tuple[object, ...]:
    held_out = "-" if one.held_out_mape is None else f"{one.held_out_mape:.1%}"
    errors = (f"{one.mape:.1%}", f"{one.bias:+.1%}", held_out, f"{one.worst_error:+.1%}")
    return (one.source, one.quantity, one.used, one.calibrating, *errors, one.worst)


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; a bar inside a cell is escaped."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
