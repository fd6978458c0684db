"""stdin, stdout and stderr that may be closed, full, or a pipe that nobody reads: none of them costs a run its work.

A stderr that cannot be written loses its talk and nothing else. A stdout that cannot be written is a result lost, which
is an error of its own. And a closed one leaves its number to the next file that is opened: what C++ logs would land
there, in the lock of a run say.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

EXIT_LOST_OUTPUT, EXIT_UNREAD = 1, 141
"""stdout cannot be written; nobody reads it any more, as a shell says of a process that SIGPIPE ended."""


class LostOutputError(Exception):
    """stdout cannot be written; no `OSError`, which a command may take for one of its own files."""

    def __init__(self, error: OSError) -> None:
        self.exit_code = EXIT_UNREAD if isinstance(error, BrokenPipeError) else EXIT_LOST_OUTPUT
        super().__init__(f"stdout cannot be written: {os.strerror(error.errno or errno.EIO)}")


class SilentStream:
    """A text stream that drops what cannot be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.is_broken = stream, False

    def write(self, text: str) -> int:
        """Write if it can be, and say that it was."""
        with self._trying():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if it can be."""
        with self._trying():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_broken = True
            self._meet(error)

    def _meet(self, error: OSError) -> None:
        pass


class _ResultStream(SilentStream):
    """A text stream that says so when it cannot be written."""

    def _meet(self, error: OSError) -> None:
        # What was not written would fail again with the next flush.
        _drop(self)
        raise LostOutputError(error)


@contextlib.contextmanager
def guarded_outputs() -> Iterator[None]:
    """Inside, stdout raises `LostOutputError`, stderr never fails, and both exist, as stdin does."""
    # Lowest first: each opening takes the lowest free number.
    sys.stdin = sys.stdin or _open(os.O_RDONLY, "r")
    # Nothing can be written to it, as to a closed one.
    sys.stdout = sys.stdout or _open(os.O_RDONLY, "w")
    sys.stderr = sys.stderr or _open(os.O_WRONLY, "w")
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    if reconfigure := getattr(before[0], "reconfigure", None):
        # As stderr does: a folder's name may have bytes that are no text.
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
    """Let what is still to be written go nowhere: Python flushes when it ends, and would complain and exit with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _open(flags: int, mode: str) -> Any:
    number = os.open(os.devnull, flags)
    return os.fdopen(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)
