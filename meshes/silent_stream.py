"""A text stream that drops what it cannot write, so that a run is not lost over a message.

stderr can be closed, full, or a pipe whose reader has ended, as in `trellax train 2>&1 | tee log` after Ctrl-C.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TextIO


class SilentStream:
    """Wrap a text stream and drop what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.is_broken = stream, False

    def write(self, text: str) -> int:
        """Write the text if possible, and return its length in any case."""
        with self._catching():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if possible."""
        with self._catching():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _catching(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_broken = True
            self._handle(error)

    def _handle(self, error: OSError) -> None:
        pass
