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


class PermutedTokens:
    """The documents of other tokens in another order, without copying them.

    >>> tokens = PermutedTokens(np.array([7, 7, 8, 9, 9, 9]), ends=np.array([1, 2, 5]), order=np.array([2, 0, 1]))
    >>> tokens.read(2, 4).tolist()
    [9, 7, 7, 8]

    Args:
        ends: int64 [D], the place of the last token of each document; the last document ends with the tokens.
        order: a permutation of the D documents.
    """

    def __init__(self, tokens: np.ndarray | JoinedTokens, *, ends: np.ndarray, order: np.ndarray) -> None:
        sizes = np.diff(ends, prepend=-1)
        self._tokens, self._given = tokens, (ends, order)
        self._starts = (ends - sizes + 1)[order]
        self.ends = np.cumsum(sizes[order]) - 1
        """Place of the last token of each document in the new order, int64 [D]."""
        self.size, self.dtype = int(tokens.size), tokens.dtype

    def permute(self, others: np.ndarray | JoinedTokens) -> "PermutedTokens":
        """Return numbers that belong to the tokens in the same order."""
        ends, order = self._given
        return PermutedTokens(others, ends=ends, order=order)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens[start : start + count]; errors are those of `read_tokens`."""
        found = []
        index = int(np.searchsorted(self.ends, start))
        while count > 0 and index < self.ends.size:
            rest = int(self.ends[index]) + 1 - start
            size = int(self.ends[index] - (self.ends[index - 1] if index else -1))
            found.append(read_tokens(self._tokens, int(self._starts[index]) + size - rest, min(count, rest)))
            start, count, index = start + found[-1].size, count - found[-1].size, index + 1
        return np.concatenate([np.empty(0, self.dtype), *found])


Tokens = Union[np.ndarray, JoinedTokens]  # noqa: UP007
"""Token ids [n], in memory, in a file, or in several."""

Readable = Union[Tokens, PermutedTokens]  # noqa: UP007
"""Tokens that are read in pieces."""


def join_tokens(parts: Sequence[Tokens]) -> JoinedTokens:
    """Return tokens one after another, without copying them."""
    return JoinedTokens([own for part in parts for own in (part.parts if isinstance(part, JoinedTokens) else [part])])


def read_tokens(tokens: Readable, start: int, count: int) -> np.ndarray:
    """Return tokens[start : start + count]; those of a memory-mapped file are read from the file.

    Reading through the map would kill the process with SIGBUS if the file was truncated, even right after a check.

    Raises:
        DataError: the file is lost or has another size.
    """
    if not isinstance(tokens, np.ndarray):
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
