"""What a run leaves behind: metrics.jsonl line by line, TensorBoard events, summary.json and loss.png.

metrics.jsonl is the record; everything else is drawn from it or beside it.
"""

import io
import json
import math
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from ..meshes import RunError
from ..meshes.files.own_file import free_name, identify_file, open_own, replace_file
from ..meshes.files.regular_file import open_regular, read_bounded
from .board import BOARD_FOLDER, Board

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PLOT_FILE = "loss.png"
NO_SCHEDULE = "none"
"""The schedule of a run without a pipeline."""
_LONGEST_LINE, _MOST_BYTES = 1 << 20, 1 << 32


class MetricsLog:
    """A writer of one JSON object per logged step, and of the same numbers for TensorBoard.

    Lines after `resumed_step` belong to steps that will be taken again, so they are dropped; with 0, all are. Numbers
    that TensorBoard lacks, because a process was killed, are given to it again.

    >>> with MetricsLog(folder, resumed_step=0) as log:
    ...     log.write(10, {"loss": 5.1, "lr": 3e-4})

    Args:
        say: told of a metrics.jsonl that was removed or replaced meanwhile; it is written again, whole.
    """

    def __init__(
        self, folder: str | Path, *, resumed_step: int = 0, say: Callable[[str], object] = lambda _: None
    ) -> None:
        self._path, self._say = Path(folder) / METRICS_FILE, say
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._folder_id = identify_file(self._path.parent)
        kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
        self._write_again("".join(f"{json.dumps(line)}\n" for line in kept).encode())
        self._board = Board(self._path.parent / BOARD_FOLDER, lines=kept, resumed_step=resumed_step)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append the numbers of one step; those that are None are left out, those that are not finite become null.

        Raises:
            RunError: the folder was moved or removed, so its record would be in two places.
        """
        given = {name: value for name, value in metrics.items() if value is not None}
        line = {"step": step} | {name: _finite(value) for name, value in given.items()}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        self._keep_whole()
        self._board.write(step, {name: value for name, value in line.items() if name != "step" and value is not None})

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()

    def _keep_whole(self) -> None:
        """See that what was written is found under its name."""
        if identify_file(self._path) == self._file_id:
            return
        if identify_file(self._path.parent) != self._folder_id:
            raise RunError(
                f"{self._path.parent} was moved or removed while the run wrote to it.",
                fix="put it back where it was, then give the same command again.",
            )
        other = ""
        if os.path.lexists(self._path):
            other = f", and the other file is {self._path.rename(free_name(self._path)).name}"
        self._file.seek(0)
        with self._file as before:
            self._write_again(before.read())
        self._say(f"{self._path} was removed or replaced while the run wrote it; it is there again, whole{other}")

    def _write_again(self, content: bytes) -> None:
        replace_file(self._path, content)
        # Also read: whoever removes the file takes its name alone.
        self._file = open_own(self._path, "a+b")
        self._file_id = identify_file(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._keep_whole()
        finally:
            self.close()


class NoLog:
    """The log of a process that leaves the run folder to another one: takes what `MetricsLog` takes, writes nothing."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; none without the file, and without lines that a crash has damaged.

    Raises:
        RunError: it is no regular file, or larger than any run's.
    """
    try:
        file = open_regular(Path(folder) / METRICS_FILE, max_bytes=_MOST_BYTES, error=RunError)
    except FileNotFoundError:
        return []
    lines = []
    with file:
        while text := file.readline(_LONGEST_LINE):
            line = _parse_line(text) if len(text) < _LONGEST_LINE else None
            if line is not None:
                lines.append(line)
    return lines


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Return a line that a run may have written: a step, and finite numbers or nulls by name."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(step := line.get("step")) is not int or not 0 <= step < 2**63:
        return None
    return line if all(_is_number(value) for value in line.values()) else None


def _is_number(value: Any) -> bool:
    # The bound is that of a float: a longer whole number could not be drawn.
    return value is None or (type(value) in (int, float) and -1e308 < value < 1e308)


def last_loss(lines: list[dict[str, Any]], *, step: int) -> float | None:
    """Return the last loss up to a step whose batch was not left out; None where there is none."""
    taken = [line["loss"] for line in lines if "loss" in line and "skipped" not in line and line["step"] <= step]
    return taken[-1] if taken else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What became of a run, and the folder that holds everything it left; losses are nats per token.

    `ended` is "done", or the signal that stopped the run; a run that was stopped is not validated.
    """

    ended: str
    steps: int
    final_train_loss: float | None
    final_val_loss: float | None
    tokens_per_s: float
    wall_time_s: float
    mesh: str
    schedule: str
    folder: str


def summary_values(summary: Summary) -> dict[str, Any]:
    """Return a summary as JSON has it: numbers that are not finite are None."""
    return {name: _finite(v) if isinstance(v, float) else v for name, v in asdict(summary).items()}


def write_summary(summary: Summary) -> Path:
    """Write a summary to summary.json in its folder, whole or not at all, and return the path."""
    path = Path(summary.folder) / SUMMARY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(summary_values(summary), indent=2) + "\n").encode())
    return path


def read_summary(folder: str | Path) -> Summary | None:
    """Return what summary.json of a run's folder says; None where there is none that can be read."""
    try:
        content = read_bounded(Path(folder) / SUMMARY_FILE, max_bytes=_LONGEST_LINE, error=RunError)
        summary = Summary(**json.loads(content))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (summary.ended, summary.mesh, summary.schedule, summary.folder)
    numbers = (summary.steps, summary.tokens_per_s, summary.wall_time_s)
    losses = (summary.final_train_loss, summary.final_val_loss)
    is_ours = all(isinstance(text, str) for text in texts) and None not in numbers
    return summary if is_ours and all(map(_is_number, (*numbers, *losses))) else None


def keep_speed(summary: Summary, before: Summary | None) -> Summary:
    """Return the summary of a call that took no step, with the time and place of the steps of the call before."""
    if before is None or before.steps != summary.steps:
        return summary
    return replace(
        summary,
        tokens_per_s=before.tokens_per_s,
        wall_time_s=before.wall_time_s,
        mesh=before.mesh,
        schedule=before.schedule,
    )


def draw_loss(folder: str | Path) -> Path | None:
    """Draw the training and validation loss of metrics.jsonl into loss.png; None when there is nothing to draw."""
    lines = read_metrics(folder)
    train, validation = _curve(lines, name="loss"), _curve(lines, name="val_loss")
    if not train and not validation:
        return None
    # matplotlib takes half a second to import, and only the end of a run needs it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for curve, label, colour, marker in (
        (train, "training", "#2a6fbb", ""),
        (validation, "validation", "#d9822b", "o"),
    ):
        if curve:
            steps, losses = zip(*curve, strict=True)
            text = f"{label}, {losses[-1]:.3f} at step {steps[-1]}"
            axes.plot(steps, losses, label=text, color=colour, linewidth=1.6, marker=marker, markersize=4.5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=Path(folder).name)
    axes.grid(visible=True, color="#dddddd", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path, picture = Path(folder) / PLOT_FILE, io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    return path


def peak_memory_bytes() -> int:
    """Return the most memory that any local device has used, or the process where devices keep no count (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finite(value: float) -> float | None:
    # JSON has no NaN; null keeps the line readable by every other tool.
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _curve(lines: list[dict[str, Any]], *, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
