"""Being asked to stop: SIGTERM and SIGINT end a run after the step it is in, with its state saved.

Of many processes one may be asked; all then stop after the same step, which jax's preemption service agrees on. It has
SIGTERM for itself.
"""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

EXIT_INTERRUPTED = 130


class StopRequest:
    """Whether this process was asked to stop; use as a context manager around a run.

    A second SIGINT ends the process at once, with exit code 130.
    """

    def __init__(self) -> None:
        self.signal_name = ""
        """The signal that asked, or "" while none has."""
        self._before: dict[signal.Signals, Any] = {}

    def is_due(self, step: int) -> bool:
        """Return whether to stop before this step; every process calls it before every step."""
        if jax.process_count() == 1:
            return bool(self.signal_name)
        due = multihost_utils.reached_preemption_sync_point(step)
        if due:
            self.signal_name = self.signal_name or "SIGTERM"
        return due

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self.signal_name:
            # Not through Python's own end: it would wait for the save under way.
            os.write(sys.stderr.fileno(), b"stopped at once; what is saved stays\n")
            os._exit(EXIT_INTERRUPTED)
        self.signal_name = self.signal_name or name
        if name == "SIGINT":
            os.write(sys.stderr.fileno(), b"stopping after this step, and saving; once more stops at once\n")
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Self:
        # Only the main thread may; elsewhere whoever runs it decides about signals.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
