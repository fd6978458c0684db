"""An exit code and a sentence where jax would abort this process because another one is lost.

When the coordinator's process dies or stands still, jax's client logs that and calls `abort` from a thread of C++, and
its callback for that case throws (jax 0.10 and 0.12). Python's own handlers of signals would run too late: `abort` does
not return to Python. So the handler is C's, and calls Python from there. Delete it when jax tells Python.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

Explain = Callable[[], tuple[str, int] | None]
"""Returns what to say and the exit code; None where no other process is at fault."""


@contextlib.contextmanager
def explained_aborts(explain: Explain) -> Iterator[None]:
    """Inside, an abort asks why it came: it ends the process as the answer says, or aborts where there is none."""
    libc: Any = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]

    def handle(number: int) -> None:
        try:
            answer = explain()
        except Exception:
            answer = None
        if answer is None:
            libc.signal(number, None)
            return
        with contextlib.suppress(OSError):
            os.write(2, answer[0].encode())
        os._exit(answer[1])

    # Referred to as long as C may call it.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, None)
