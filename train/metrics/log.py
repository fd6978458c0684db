"""Write and read metrics.jsonl, the record of a run: one JSON object per logged step.

TensorBoard's events are written beside it (`tensorboard.py`), and trackers are sent the same (`trackers/`); loss.png is
drawn from it (`loss_plot.py`).
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ...configs.sections import TrackerName
from ...meshes import RunError
from ...meshes.files.own_file import free_name, identify_file, open_own, replace_file
from ...meshes.files.regular_file import open_regular
from .tensorboard import BOARD_FOLDER, EventWriter
from .trackers.open import open_trackers
from .trackers.tracker import Ended, RunFacts, finite_values

METRICS_FILE = "metrics.jsonl"

SET = "val_loss/"
"""What begins the name of the loss of a further validation set."""

_MAX_LINE_BYTES, _MAX_FILE_BYTES = 1 << 20, 1 << 32


class MetricsLog:
    """Append the metrics of a step to metrics.jsonl and to TensorBoard's events; use as a context manager.

    Opening drops the lines after `resumed_step`, since those steps will be taken again; with 0 it drops all of them.
    Events that TensorBoard lacks because a process was killed are written again.

    >>> with MetricsLog(folder, resumed_step=0) as log:
    ...     log.write(10, {"loss": 5.1, "lr": 3e-4})

    Args:
        hyperparameters: values by name, shown in TensorBoard's table of runs.
        log_to: trackers that are sent the same.
        say: called with a message when metrics.jsonl was removed or replaced while the run wrote it; the file is then
            written again from the start.

    Raises:
        RunError: metrics.jsonl is there, and not a regular file or larger than 4 GiB.
        OSError: the folder cannot be written.
        ConfigError: a tracker cannot begin its run.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resumed_step: int = 0,
        hyperparameters: Mapping[str, object] | None = None,
        log_to: Sequence[TrackerName] = (),
        say: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._path, self._say = Path(folder) / METRICS_FILE, say
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._folder_id = identify_file(self._path.parent)
        kept = [line for line in read_metrics(folder) if line["step"] <= resumed_step]
        self._rewrite("".join(f"{json.dumps(line)}\n" for line in kept).encode())
        self._events = EventWriter(
            self._path.parent / BOARD_FOLDER,
            lines=kept,
            resumed_step=resumed_step,
            hyperparameters=hyperparameters or {},
        )
        own = {"name": Path(folder).name, "folder": str(folder), "hyperparameters": hyperparameters or {}}
        self._trackers = open_trackers(log_to, RunFacts(**own, lines=kept), say=say)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append the metrics of one step; a None is left out, a number that is not finite becomes null.

        Raises:
            RunError: the run folder was moved or removed.
        """
        given = {name: value for name, value in metrics.items() if value is not None}
        line = {"step": step} | {name: finite_or_none(value) for name, value in given.items()}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        self._restore_if_removed()
        self._events.write(step, finite_values(line))
        self._trackers.write(step, finite_values(line))

    def close(self, ended: Ended = "whole") -> None:
        """Close both files, and end the command in the trackers."""
        self._file.close()
        self._events.close()
        self._trackers.close(ended)

    def _restore_if_removed(self) -> None:
        """Write metrics.jsonl again if another process has removed or replaced it."""
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
        # Removing a file removes its name only: the open file descriptor still reads the content.
        self._file.seek(0)
        with self._file as before:
            self._rewrite(before.read())
        self._say(f"{self._path} was removed or replaced while the run wrote it; it is there again, whole{other}")

    def _rewrite(self, content: bytes) -> None:
        replace_file(self._path, content)
        # Opened for reading as well as appending, so that `_restore_if_removed` can copy it.
        self._file = open_own(self._path, "a+b")
        self._file_id = identify_file(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._restore_if_removed()
        finally:
            self.close("whole" if kind is None else "failed")


class NoLog:
    """Discard metrics: the log of every process but the first, which alone writes the run folder."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without damaged ones; an empty list if there is no such file.

    Raises:
        RunError: it is not a regular file, or larger than 4 GiB.
    """
    try:
        file = open_regular(Path(folder) / METRICS_FILE, max_bytes=_MAX_FILE_BYTES, error=RunError)
    except FileNotFoundError:
        return []
    lines = []
    with file:
        # A line that a kill has cut short is not JSON, and is left out.
        while text := file.readline(_MAX_LINE_BYTES):
            line = _parse_line(text) if len(text) < _MAX_LINE_BYTES else None
            if line is not None:
                lines.append(line)
    return lines


def set_metrics(losses: Mapping[str, float]) -> dict[str, float]:
    """Return the losses of further validation sets by the names of their metrics."""
    return {f"{SET}{name}": loss for name, loss in losses.items()}


def last_set_losses(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last loss of each further validation set, by its name."""
    pairs = [(name, value) for line in lines for name, value in line.items() if name.startswith(SET)]
    return {name.removeprefix(SET): value for name, value in pairs if value is not None}


def last_loss(lines: list[dict[str, Any]], *, step: int) -> float | None:
    """Return the training loss of the last logged step up to `step` that was not skipped, or None."""
    taken = [line["loss"] for line in lines if "loss" in line and "skipped" not in line and line["step"] <= step]
    return taken[-1] if taken else None


def finite_or_none(value: float) -> float | None:
    """Return a number as JSON can hold it: None in place of NaN and infinity, which JSON lacks."""
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def is_finite_or_none(value: Any) -> bool:
    """Return whether a value read from JSON is None or a number that a float can hold."""
    return value is None or (type(value) in (int, float) and -1e308 < value < 1e308)


def _parse_line(text: bytes) -> dict[str, Any] | None:
    """Return a line that `MetricsLog` may have written: a step, and finite numbers or nulls by name."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(step := line.get("step")) is not int or not 0 <= step < 2**63:
        return None
    return line if all(map(is_finite_or_none, line.values())) else None
