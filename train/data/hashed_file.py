"""Detect that a memory-mapped token file has changed since its tokens were hashed.

A write in place keeps name and size. So the file's metadata (inode, size, both times) is compared at every step, which
costs one stat. Only where it differs are the bytes hashed again: a copy or a `touch` is not a change.
"""

import hashlib
import threading
import time
from pathlib import Path

from ...meshes import DataError
from ...meshes.files.regular_file import open_regular

_CHUNK_BYTES = 1 << 24
_CLOCK_TICK_NS = 20_000_000
"""Longer than one tick of the clock that sets file times; two writes within one tick have the same time."""

_Metadata = tuple[int, int, int, int, int]
"""Device, inode, size, modification time and change time."""


class HashedFile:
    """A file, or a part of it, with a known SHA-256; another file that takes its path later counts as changed.

    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._metadata = path, _read_settled_metadata(path)
        self._span, self._sha256 = (0, 0), ""
        self._lock = threading.Lock()

    @property
    def sha256(self) -> str:
        """The expected hash, "" before `expect`."""
        return self._sha256

    def expect(self, sha256: str, *, offset: int, num_bytes: int) -> None:
        """Set the hash of the `num_bytes` bytes from `offset` on, as read since the file was opened.

        Raises:
            DataError: the file has changed since it was opened.
        """
        self._span, self._sha256 = (offset, num_bytes), sha256
        self.check()

    def check(self) -> None:
        """Raise unless the bytes still have the expected hash; threads may call it at the same time.

        Raises:
            DataError: the file is lost or changed.
        """
        with self._lock:
            if _read_metadata(self.path) == self._metadata:
                return
            check_size(self.path, self._metadata[2])
            # Read before hashing: a write that comes while the bytes are hashed changes the metadata again.
            settled = _read_settled_metadata(self.path)
            if _hash_span(self.path, *self._span) != self._sha256:
                raise _changed(self.path, "it has other tokens")
            self._metadata = settled


def check_size(path: Path, num_bytes: int) -> None:
    """Raise if a file that the run reads is lost, or has another size.

    Raises:
        DataError: the file is lost or has another size.
    """
    size = _read_metadata(path)[2]
    if size != num_bytes:
        raise _changed(path, f"{size:,} bytes, not {num_bytes:,}")


def _read_metadata(path: Path) -> _Metadata:
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: lost while the run read it: {error.strerror}.", fix="bring it back.") from None
    # Programs can set the modification time back, but not the change time.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read_settled_metadata(path: Path) -> _Metadata:
    """Return metadata that every later write changes: if the file is new, wait one clock tick and read again."""
    metadata = _read_metadata(path)
    if abs(time.time_ns() - metadata[4]) < _CLOCK_TICK_NS:
        time.sleep(_CLOCK_TICK_NS / 1e9)
        metadata = _read_metadata(path)
    return metadata


def _hash_span(path: Path, offset: int, num_bytes: int) -> str:
    digest = hashlib.sha256()
    try:
        with open_regular(path, error=DataError) as file:
            file.seek(offset)
            while num_bytes and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
                digest.update(chunk)
                num_bytes -= len(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    return digest.hexdigest()


def _changed(path: Path, what: str) -> DataError:
    return DataError(f"{path}: changed while the run read it: {what}.", fix="bring the old file back.")
