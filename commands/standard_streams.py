"""Guard a command against a stdin, stdout or stderr that is closed, full, or a pipe without a reader.

A run must not lose its work over one. Messages that stderr cannot take are dropped. A result that stdout cannot take is
an error of its own. A closed stream must be reopened: else the next file to be opened, such as the lock of a run, gets
its file descriptor, and C++ code logs into that file.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..meshes.silent_stream import SilentStream

EXIT_LOST_OUTPUT, EXIT_UNREAD = 1, 141
"""Exit codes: stdout cannot be written; and its reader has gone, 128 + SIGPIPE as shells report it."""


class LostOutputError(Exception):
    """Raised when stdout cannot be written. It is not an `OSError`, which a command may catch for its own files."""

    def __init__(self, error: OSError) -> None:
        self.exit_code = EXIT_UNREAD if isinstance(error, BrokenPipeError) else EXIT_LOST_OUTPUT
        super().__init__(f"stdout cannot be written: {os.strerror(error.errno or errno.EIO)}")


class _ResultStream(SilentStream):
    """Wrap a text stream and raise `LostOutputError` when it cannot be written."""

    def _handle(self, error: OSError) -> None:
        # The unwritten text stays in the buffer, and the next flush would fail again.
        _drop(self)
        raise LostOutputError(error)


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside the context stdin, stdout and stderr are open, stdout raises `LostOutputError`, and stderr never fails."""
    # In this order, since each open() takes the lowest free file descriptor: 0, 1, 2.
    sys.stdin = sys.stdin or _open(os.O_RDONLY, "r")
    # Opened for reading, so that writing fails as it does on a closed stream.
    sys.stdout = sys.stdout or _open(os.O_RDONLY, "w")
    sys.stderr = sys.stderr or _open(os.O_WRONLY, "w")
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    if reconfigure := getattr(before[0], "reconfigure", None):
        # As on stderr: the name of a folder may hold bytes that are not valid text.
        reconfigure(errors="backslashreplace")
    guards: tuple[Any, Any] = _ResultStream(before[0]), SilentStream(before[1])
    sys.stdout, sys.stderr = guards
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if guards[1].is_broken:
            _drop(guards[1])


def _drop(stream: Any) -> None:
    """Redirect a stream to /dev/null: Python flushes it at exit, and would print an error and exit with code 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open(flags: int, mode: str) -> Any:
    number = os.open(os.devnull, flags)
    return os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
