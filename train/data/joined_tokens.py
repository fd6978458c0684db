"""Read several arrays of token ids as one, without copying them: each stays memory-mapped.

Read `batches.py` for the use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from ...meshes import DataError
from .hashed_file import check_size


class JoinedTokens:
    """Arrays of token ids one after another, as one that is read in pieces.

    >>> tokens = JoinedTokens([np.arange(3), np.arange(10, 14)])
    >>> tokens.size, tokens[2:5].read(0, 3).tolist()
    (7, [2, 10, 11])

    Args:
        parts: arrays [n] of integers; they may be memory-mapped.
    """

    def __init__(self, parts: Sequence[np.ndarray], *, dtype: np.dtype | None = None) -> None:
        self.parts = tuple(part for part in parts if part.size)
        # int64 where numpy would promote uint64 and signed integers to float64, which cannot hold all ids.
        common = dtype or np.result_type(*self.parts or (np.uint16,))
        self.dtype: np.dtype = common if common.kind in "ui" else np.dtype(np.int64)
        """Type of what is read, which holds the ids of every part."""
        self._ends = np.cumsum([part.size for part in self.parts], dtype=np.int64)
        self.size = int(self._ends[-1]) if self.parts else 0
        """Number of tokens."""

    def __getitem__(self, place: slice) -> "JoinedTokens":
        """Return the tokens of a slice of step 1; nothing is read."""
        start, stop, _ = place.indices(self.size)
        starts = self._ends - [part.size for part in self.parts]
        cut = [
            part[max(0, start - first) : max(0, stop - first)]
            for part, first in zip(self.parts, starts.tolist(), strict=True)
        ]
        return JoinedTokens(cut, dtype=self.dtype)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens[start : start + count].

        Raises:
            DataError: a memory-mapped file is lost or has another size.
        """
        found = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0 and index < len(self.parts):
            part = self.parts[index]
            first = start - (int(self._ends[index]) - part.size)
            found.append(read_tokens(part, first, min(count, part.size - first)))
            start, count, index = start + found[-1].size, count - found[-1].size, index + 1
        return np.concatenate([np.empty(0, self.dtype), *found], dtype=self.dtype, casting="unsafe")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return all tokens in memory."""
        del copy
        return self.read(0, self.size).astype(dtype or self.dtype)


Tokens = Union[np.ndarray, JoinedTokens]  # noqa: UP007
"""Token ids [n], in memory, in a file, or in several."""


def join_tokens(parts: Sequence[Tokens]) -> JoinedTokens:
    """Return tokens one after another, without copying them."""
    return JoinedTokens([own for part in parts for own in (part.parts if isinstance(part, JoinedTokens) else [part])])


def read_tokens(tokens: Tokens, start: int, count: int) -> np.ndarray:
    """Return tokens[start : start + count]; those of a memory-mapped file are read from the file.

    Reading through the map would kill the process with SIGBUS if the file was truncated, even right after a check.

    Raises:
        DataError: the file is lost or has another size.
    """
    if isinstance(tokens, JoinedTokens):
        return tokens.read(start, count)
    if not isinstance(tokens, np.memmap):
        return tokens[start : start + count]
    # A slice keeps the offset of the whole map, so the place in the file follows from the two addresses.
    whole = tokens.base if isinstance(tokens.base, np.memmap) else tokens
    place = whole.offset + tokens.ctypes.data - whole.ctypes.data + start * tokens.itemsize
    file = Path(str(tokens.filename))
    try:
        window = np.fromfile(file, tokens.dtype, count, offset=place)
    except OSError:
        window = np.empty(0, tokens.dtype)
    if window.size < count:
        check_size(file, whole.offset + whole.nbytes)
        raise DataError(f"{file}: cannot be read from byte {place:,}.", fix="look at the disk.")
    return window
