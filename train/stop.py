"""Being asked to stop: SIGTERM, SIGINT and SIGHUP end a run after the step it is in, with its state saved.

SIGHUP comes when the terminal or the ssh session is lost; a run under nohup, which has it ignored, goes on.

Of many processes one may be asked; all then stop after the same step, which jax's preemption service agrees on. It has
SIGTERM for itself.
"""

import contextlib
import os
import signal
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
        """The signal that ended the run, or "" while none has."""
        self._asked, self._is_interrupted = "", False
        self._before: dict[signal.Signals, Any] = {}

    def is_due(self, step: int) -> bool:
        """Return whether to stop before this step; every process calls it before every step."""
        if jax.process_count() == 1:
            self.signal_name = self._asked
        elif multihost_utils.reached_preemption_sync_point(step):
            self.signal_name = self._asked or "SIGTERM"
        return bool(self.signal_name)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT" and self._is_interrupted:
            # Not through Python's own end: it would wait for the save under way.
            _tell(b"stopped at once; what is saved stays\n")
            os._exit(EXIT_INTERRUPTED)
        # What the run makes of it is decided before a step, where all processes decide the same.
        self._asked = self._asked or name
        if name == "SIGINT":
            self._is_interrupted = True
            _tell(b"stopping after this step, and saving; once more stops at once\n")
        if name != "SIGTERM" and jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def __enter__(self) -> Self:
        # Only the main thread may; elsewhere whoever runs it decides about signals.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT]
            if jax.process_count() == 1:
                numbers.append(signal.SIGTERM)
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _tell(text: bytes) -> None:
    # Ctrl-C ends a `tee` at the other end of a pipe first: nobody to tell is no reason not to save.
    with contextlib.suppress(OSError):
        os.write(2, text)
