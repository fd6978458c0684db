"""Stop a run on SIGTERM, SIGINT or SIGHUP, after the current step and with its state saved.

SIGHUP is sent when the terminal or the ssh session is lost. If nohup ignores it, trellax ignores it too.

With many processes the signal may reach only one of them. jax's preemption service, which handles SIGTERM itself, then
makes all of them agree on the step to stop after.
"""

import contextlib
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 130

BUDGET = "train.seconds"
"""What ended a run whose time was up."""


class StopRequest:
    """Handle the signals that ask a run to stop; use as a context manager around it.

    A second SIGINT ends the process at once, with exit code 130.

    Args:
        seconds: seconds after which the run is asked to stop, from when the context is entered; 0 is no limit.
    """

    def __init__(self, *, seconds: int = 0) -> None:
        self.signal_name = ""
        """Name of the signal that ended the run, `BUDGET` if its time was up, or ""."""
        self._asked, self._is_interrupted = "", False
        self._seconds, self._end_s = seconds, 0.0
        self._before: dict[signal.Signals, Any] = {}

    def is_due(self, step: int) -> bool:
        """Return whether to stop after `step` steps; every process calls it before every step."""
        if self._seconds and not self._asked and time.monotonic() >= self._end_s:
            self._asked = BUDGET
            if jax.process_count() > 1:
                # Clocks differ: the preemption service makes the processes agree on the step.
                os.kill(os.getpid(), signal.SIGTERM)
        if jax.process_count() == 1:
            self.signal_name = self._asked
        elif multihost_utils.reached_preemption_sync_point(step):
            self.signal_name = self._asked or "SIGTERM"
        return bool(self.signal_name)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self._is_interrupted:
            # Not sys.exit: Python would wait for the thread of the save in progress.
            _write_stderr(b"stopped at once; what is saved stays\n")
            os._exit(EXIT_INTERRUPTED)
        # Only noted here. `is_due` decides before a step, where all processes decide the same.
        self._asked = self._asked or name
        if name == "SIGINT":
            self._is_interrupted = True
            _write_stderr(b"stopping after this step, and saving; once more stops at once\n")
        if name != "SIGTERM" and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Self:
        self._end_s = time.monotonic() + self._seconds
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if jax.process_count() == 1:
                numbers.append(signal.SIGTERM)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _write_stderr(text: bytes) -> None:
    # In `trellax train 2>&1 | tee log`, Ctrl-C ends tee first. A broken pipe must not keep the run from saving.
    with contextlib.suppress(OSError):
        os.write(2, text)
