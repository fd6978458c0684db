"""Handle SIGABRT from C, to exit with a message and a code when jax aborts because another process is lost.

When the coordinator's process dies or hangs, jax's client logs it and calls `abort` from a C++ thread; the callback
that jax offers for this case throws (jax 0.10 and 0.12). A Python signal handler would never run, since `abort` does
not return to the interpreter. So the handler is installed through C and calls Python from there. Delete this file when
jax reports the loss to Python.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

Explain = Callable[[], tuple[str, int] | None]
"""Returns a message and an exit code, or None if no other process is at fault."""


@contextlib.contextmanager
def handle_aborts(explain: Explain) -> Iterator[None]:
    """Inside the context, answer an abort with the message and exit code of `explain`, or abort if it returns None."""
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

    # Kept in a variable: ctypes frees a callback that nothing refers to, and C may still call it.
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, None)
