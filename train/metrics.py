"""What a run leaves behind: metrics.jsonl line by line, TensorBoard events, summary.json and loss.png.

metrics.jsonl is the record; everything else is drawn from it or beside it.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PLOT_FILE = "loss.png"
NO_SCHEDULE = "none"
"""The schedule of a run without a pipeline."""
_FLUSH_EVERY_S = 30
_EVENTS: Any = event_pb2
"""Its classes are made when it is imported, so no type checker knows them."""


class MetricsLog:
    """A writer of one JSON object per logged step, and of the same numbers for TensorBoard.

    Lines after `resumed_step` belong to steps that will be taken again, so they are dropped; with 0, all are.

    >>> with MetricsLog(folder, resumed_step=0) as log:
    ...     log.write(10, {"loss": 5.1, "lr": 3e-4})
    """

    def __init__(self, folder: str | Path, *, resumed_step: int = 0) -> None:
        self._path = Path(folder) / METRICS_FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
        _replace(self._path, "".join(f"{json.dumps(line)}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _Board(self._path.parent / "tensorboard", purge_step=resumed_step + 1)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append the numbers of one step; those that are None are left out, those that are not finite become null."""
        given = {name: value for name, value in metrics.items() if value is not None}
        line = {"step": step} | {name: _finite(value) for name, value in given.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in given.items():
            if _finite(value) is not None:
                self._board.write(_EVENTS.Event(step=step, summary=scalar(name, value)))

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
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
    """Return the lines of a run's metrics.jsonl; none without the file, and without lines that a crash has damaged."""
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


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
    _replace(path, json.dumps(summary_values(summary), indent=2) + "\n")
    return path


def read_summary(folder: str | Path) -> Summary | None:
    """Return what summary.json of a run's folder says; None where there is none that can be read."""
    try:
        return Summary(**json.loads((Path(folder) / SUMMARY_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


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
    path = Path(folder) / PLOT_FILE
    figure.savefig(path)
    return path


def peak_memory_bytes() -> int:
    """Return the most memory that any local device has used, or the process where devices keep no count (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return max(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _Board:
    """TensorBoard's events, written at once: tensorboardX's own thread dies of a full disk and makes the run wait."""

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._events, self._flushed_s = EventsWriter(str(folder / "events")), time.monotonic()
        start = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self.write(_EVENTS.Event(step=purge_step, session_log=start))

    def write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        if time.monotonic() > self._flushed_s + _FLUSH_EVERY_S:
            self._events.flush()
            self._flushed_s = time.monotonic()

    def close(self) -> None:
        self._events.close()


def _finite(value: float) -> float | None:
    # JSON has no NaN; null keeps the line readable by every other tool.
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _curve(lines: list[dict[str, Any]], *, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
