"""Unpack Zstandard as a stream, across frames, and notice a file that is cut off, which the library passes over."""

from io import BufferedReader, RawIOBase
from typing import Any

_PACKED = 1 << 14
"""Packed bytes that are read at a time; small, since a few of them may stand for megabytes."""


class Unzst(RawIOBase):
    """The unpacked bytes of a stream; wrap it in `io.BufferedReader`.

    Args:
        packed: the stream, which is closed with this one.
        zstandard: the package of this name.
    """

    def __init__(self, packed: BufferedReader, zstandard: Any) -> None:
        self._packed, self._zstandard = packed, zstandard
        self._frame: Any = None
        self._ready, self._rest = memoryview(b""), b""

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, and return the number of bytes; 0 at the end.

        Raises:
            ValueError: the bytes are no Zstandard, or cut off.
        """
        while not self._ready:
            packed = self._rest or self._packed.read(_PACKED)
            if not packed:
                if self._frame is not None:
                    raise ValueError("the last frame is cut off")
                return 0
            self._ready = memoryview(self._unpack(packed))
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> bytes:
        self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
        try:
            unpacked = self._frame.decompress(packed)
        except self._zstandard.ZstdError as error:
            raise ValueError(str(error)) from None
        # Files that were packed in pieces have several frames.
        self._rest, self._frame = (self._frame.unused_data, None) if self._frame.eof else (b"", self._frame)
        return unpacked

    def close(self) -> None:
        """Close both streams."""
        self._packed.close()
        super().close()
