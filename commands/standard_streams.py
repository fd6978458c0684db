"""Guard a command against a stdin, stdout or stderr that is closed, full, or a pipe without a reader.

Messages that cannot be written to stderr are dropped, so that no run is lost over them. A result that cannot be written
to stdout is a `LostOutputError`. Closed streams are reopened: otherwise the next opened file, such as the lock of a
run, would get the file descriptor, and C++ code would log into it.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

from ..meshes.silent_stream import SilentStream

EXIT_LOST_OUTPUT, EXIT_UNREAD = 1, 141
"""Exit codes: stdout cannot be written; and the reader of its pipe has ended, 128 + SIGPIPE as in shells."""


class LostOutputError(Exception):
    """Raised when stdout cannot be written. It is not an `OSError`, which a command may catch for its own files."""

    def __init__(self, error: OSError) -> None:
        self.exit_code = EXIT_UNREAD if isinstance(error, BrokenPipeError) else EXIT_LOST_OUTPUT
        super().__init__(f"stdout cannot be written: {os.strerror(error.errno or errno.EIO)}")


class _ResultStream(SilentStream):
    """Wrap a text stream and raise `LostOutputError` when it cannot be written."""

    def _handle(self, error: OSError) -> None:
        # The text stays in the buffer, so without this the next flush would fail again.
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


def guarded_stdout(descriptor: int) -> Any:
    """Return a text stream on a file descriptor, which stays open, that raises `LostOutputError`, as stdout does."""
    return _ResultStream(os.fdopen(descriptor, "w", errors="backslashreplace", closefd=False))


def _drop(stream: Any) -> None:
    """Redirect a stream to /dev/null: Python flushes it at exit, and would print an error and exit with code 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open(flags: int, mode: str) -> Any:
    number = os.open(os.devnull, flags)
    return os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
