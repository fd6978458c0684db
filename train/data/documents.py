"""Where the documents of a corpus end, so that a sequence may hold several and no token sees those of another.

    tokens      a  b  c  $  d  e  $  f      $ ends a document
    segments    0  0  0  0  1  1  1  2
    positions   0  1  2  3  0  1  2  0
    weight      1  1  1  0  1  1  0  1      the token behind $ is not for it to predict

A document that a sequence does not hold to its end goes on in another sequence, as a document of its own. Read
`batches.py` next.
"""

from dataclasses import dataclass

import numpy as np

from .joined_tokens import Tokens, read_tokens

_CHUNK = 1 << 24


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents end: at every token with the id `end_id`, or at the places `ends` of their last tokens.

    >>> Documents(end_id=0).is_last(np.array([5, 6, 0, 7]), start=0)
    array([False, False,  True, False])
    """

    end_id: int | None = None
    ends: np.ndarray | None = None

    def is_last(self, tokens: np.ndarray, *, start: int) -> np.ndarray:
        """Return which of the tokens from place `start` of a corpus on are the last of their document, bool."""
        if self.ends is None:
            return tokens == self.end_id
        found = np.zeros(tokens.shape, bool)
        first, last = np.searchsorted(self.ends, (start, start + tokens.size))
        found[self.ends[first:last] - start] = True
        return found

    def find_ends(self, tokens: Tokens) -> np.ndarray:
        """Return the places of the last tokens of all documents, int64 [D]; the end of the tokens ends the last one."""
        ends = self.ends
        if ends is None:
            starts = range(0, tokens.size, _CHUNK)
            pieces = ((start, read_tokens(tokens, start, min(_CHUNK, tokens.size - start))) for start in starts)
            found = [start + np.flatnonzero(piece == self.end_id) for start, piece in pieces]
            ends = np.concatenate([np.empty(0, np.int64), *found])
        ends = ends[ends < tokens.size - 1]
        return np.append(ends, tokens.size - 1).astype(np.int64)

    def behind(self, start: int) -> "Documents":
        """Return the same of the part of the corpus from place `start` on."""
        if self.ends is None:
            return self
        return Documents(ends=self.ends[np.searchsorted(self.ends, start) :] - start)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The documents of sequences: `segments` and `positions` int32 [..., T], and which count, bool."""

    segments: np.ndarray
    positions: np.ndarray
    predicts: np.ndarray


def pack(is_last: np.ndarray) -> Packed:
    """Return the documents of sequences [..., T] from which of their tokens are the last of one."""
    starts = np.zeros(is_last.shape, bool)
    starts[..., 0], starts[..., 1:] = True, is_last[..., :-1]
    place = np.broadcast_to(np.arange(is_last.shape[-1], dtype=np.int32), is_last.shape)
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
    return Packed(
        segments=starts.cumsum(-1, dtype=np.int32) - 1,
        positions=(place - first).astype(np.int32),
        predicts=~is_last,
    )
