"""Whether a file that a run reads all the time still holds the tokens that were hashed when it began.

A write in place keeps size and name. What the system notes of a file (inode, size, both times) is compared at every
step, for the price of a stat; where any of it differs the bytes are hashed again, as a copy or a `touch` is no change.
"""

import hashlib
import threading
import time
from pathlib import Path

from ...meshes import DataError
from ...meshes.files.regular_file import open_regular

_CHUNK = 1 << 24
_CLOCK_TICK_NS = 20_000_000
"""Longer than the step of the clock that file times are taken from: two writes in one step look like one."""

_Note = tuple[int, int, int, int, int]


class WatchedFile:
    """A part of a file whose bytes are known; `path` names it, whatever file that is later."""

    def __init__(self, path: Path) -> None:
        self.path, self._note = path, _settle(path)
        self._place, self._sha256 = (0, 0), ""
        self._lock = threading.Lock()

    def expect(self, sha256: str, *, offset: int, num_bytes: int) -> None:
        """Say what was read of the file since it was opened: bytes from `offset`, and their hash.

        Raises:
            DataError: it changed meanwhile.
        """
        self._place, self._sha256 = (offset, num_bytes), sha256
        self.check()

    def check(self) -> None:
        """Raise unless the bytes are still those that were hashed.

        Raises:
            DataError: naming the file, and whether it has gone or changed.
        """
        with self._lock:
            note = _take_note(self.path)
            if note == self._note:
                return
            check_size(self.path, self._note[2])
            settled = _settle(self.path)
            if _hash_part(self.path, *self._place) != self._sha256:
                raise _changed(self.path, "it has other tokens")
            self._note = settled


def check_size(path: Path, num_bytes: int) -> None:
    """Raise if a file that the run reads has gone or is not of this many bytes.

    Raises:
        DataError: naming the file.
    """
    note = _take_note(path)
    if note[2] != num_bytes:
        raise _changed(path, f"{note[2]:,} bytes, not {num_bytes:,}")


def _take_note(path: Path) -> _Note:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: lost while the run read it: {error.strerror}.", fix="bring it back.") from None
    # Nobody can set the last of these, so it tells of a write whose time was set back.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _settle(path: Path) -> _Note:
    """Take a note that every later write changes: of a file written just now the clock must have moved on first."""
    note = _take_note(path)
    if abs(time.time_ns() - note[4]) < _CLOCK_TICK_NS:
        time.sleep(_CLOCK_TICK_NS / 1e9)
        note = _take_note(path)
    return note


def _hash_part(path: Path, offset: int, num_bytes: int) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path, error=DataError) as file:
            file.seek(offset)
            while num_bytes and (chunk := file.read(min(_CHUNK, num_bytes))):
                digest.update(chunk)
                num_bytes -= len(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    return digest.hexdigest()


def _changed(path: Path, what: str) -> DataError:
    return DataError(f"{path}: changed while the run read it: {what}.", fix="bring the old file back.")
