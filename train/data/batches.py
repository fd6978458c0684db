"""Cut batches out of a corpus, each a pure function of the seed and the step.

A run therefore resumes from its step alone, without the state of an iterator, and sees the same data on any mesh. Grain
shuffles. Read `../step.py` next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from ...meshes import DataError
from ...meshes.arguments import check_count
from .documents import Documents, pack
from .joined_tokens import JoinedTokens, Readable, Tokens, read_tokens


@dataclass(frozen=True, kw_only=True)
class TokenSource:
    """Tokens [n] to cut sequences from, and their share of all sequences: `weight` / the sum of the weights.

    documents: where they end; None where sequences are not cut at their ends.
    mask: for each token whether it counts as a target, 0 or 1; None if all do.
    """

    tokens: Readable
    documents: Documents | None = None
    mask: Readable | None = None
    weight: float = 1.0


class Batches:
    """Index the batches of a corpus that repeats without end and is shuffled anew in every epoch.

    `batches[step]` is a dict of `tokens` and `targets` int32[M, B, T] and `weights` float32[M, B, T], where M is
    `microbatches` and B is `batch_size / microbatches`. The weights of a step sum to 1, so its loss is the sum of
    weights x negative log-likelihood, however the step is cut. Where sequences hold several documents, also `segments`
    and `positions` int32[M, B, T], and the last token of a document has weight 0 (`documents.py`).

    An epoch covers every token once. Its windows of T + 1 tokens share only their end points, except for the last
    window, which is moved back to end where the corpus ends. A batch may lie across two epochs, so that no sequence
    is dropped:

        sequence | 0 1 2 3 4 5 6 0' 1' 2' 3' 4' ...     7 windows an epoch
        batch    | 0 0 0 0 1 1 1 1  2  2  2  2  ...     batch_size = 4

    Of several sources, each repeats on its own, and sequence i is the next one of the source that is furthest behind
    its share. Which one that is follows from i alone:

        weights 3 and 1 | a0 a1 b0 a2 a3 a4 b1 a5 ...

    >>> batches = Batches(np.arange(100, dtype=np.uint8), seq_len=8, batch_size=4, microbatches=2, seed=0)
    >>> batches[7]["tokens"].shape
    (2, 2, 8)

    Args:
        tokens: the tokens, or several sources of them.
        documents: where the documents of `tokens` end; None where sequences are not cut at their ends.
        first_sequence: index of the sequence at which batch 0 starts. It is not 0, and may be negative, for a run
            that was resumed with another batch size.

    Raises:
        DataError: the corpus has no full sequence, or the batch does not split into microbatches.
    """

    def __init__(
        self,
        tokens: Tokens | Sequence[TokenSource],
        *,
        seq_len: int,
        batch_size: int,
        microbatches: int,
        seed: int,
        documents: Documents | None = None,
        first_sequence: int = 0,
    ) -> None:
        for name, count in {"seq_len": seq_len, "batch_size": batch_size, "microbatches": microbatches}.items():
            check_count(name, count, error=DataError)
        check_count("seed", seed, error=DataError, least=0)
        check_count("first_sequence", first_sequence, error=DataError, least=None)
        if batch_size % microbatches:
            raise DataError(
                f"a batch of {batch_size} sequences does not split into {microbatches} microbatches.",
                fix="make batch_size a multiple of microbatches.",
            )
        if isinstance(tokens, np.ndarray | JoinedTokens):
            tokens = (TokenSource(tokens=tokens, documents=documents),)
        self._is_packed = tokens[0].documents is not None
        self._is_masked = any(own.mask is not None for own in tokens)
        windows = [_Windows(source=own, seq_len=seq_len, is_masked=self._is_masked) for own in tokens]
        weights = [own.weight for own in tokens]
        # Another seed for each source: those of one size would else have one order.
        seeded = [grain.MapDataset.source(own).seed((seed + i) % 2**32) for i, own in enumerate(windows)]
        self._rows = _mix([own.shuffle().repeat() for own in seeded], weights)
        self._shape = (microbatches, batch_size // microbatches, seq_len)
        self._batch_size, self._first_sequence = batch_size, first_sequence
        self.num_windows = len(_mix(seeded, weights))
        """Number of sequences in one epoch; of several sources, until the first would repeat."""

    def num_sequences(self, step: int) -> int:
        """Return the index of the first sequence of batch `step`, counted over all epochs."""
        return self._first_sequence + step * self._batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        # Not negative for the steps of a run, even where `first_sequence` is.
        start = self.num_sequences(step)
        rows = np.stack([np.asarray(self._rows[start + row]) for row in range(self._batch_size)])
        batch = {
            "tokens": rows[:, 0, :-1].reshape(self._shape),
            "targets": rows[:, 0, 1:].reshape(self._shape),
            "weights": np.full(self._shape, 1 / np.prod(self._shape), np.float32),
        }
        if not self._is_packed and not self._is_masked:
            return batch
        counts = np.ones(self._shape, bool)
        if self._is_packed:
            packed = pack(rows[:, 1, :-1].reshape(self._shape).astype(bool))
            counts &= packed.predicts
            batch |= {"segments": packed.segments, "positions": packed.positions}
        if self._is_masked:
            counts &= rows[:, -1, 1:].reshape(self._shape).astype(bool)
        return batch | {"weights": (counts / max(1, counts.sum())).astype(np.float32)}


def _mix(rows: list[Any], weights: list[float]) -> Any:
    return rows[0] if len(rows) == 1 else grain.MapDataset.mix(rows, weights)


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Index the windows of seq_len + 1 tokens in a corpus; the last token of one is the first of the next.

    A window is int32 [n, seq_len + 1]: the tokens; with documents, whether each is the last of its own; with a mask,
    whether each counts as a target.
    """

    source: TokenSource
    seq_len: int
    is_masked: bool

    def __post_init__(self) -> None:
        size, needed = self.source.tokens.size, self.seq_len + 1
        if size < needed:
            raise DataError(
                f"{size} tokens hold no sequence of {self.seq_len}, which needs {needed} with its targets.",
                fix="use more text or a shorter data.seq_len.",
            )

    def __len__(self) -> int:
        # So that every token but the first is a target. 100 tokens and seq_len=8 give 13 windows, the last from 91 on.
        return (self.source.tokens.size - 2) // self.seq_len + 1

    def __getitem__(self, index: int) -> np.ndarray:
        source, count = self.source, self.seq_len + 1
        start = min(index * self.seq_len, source.tokens.size - count)
        tokens = read_tokens(source.tokens, start, count)
        rows = [tokens]
        if source.documents is not None:
            rows.append(source.documents.is_last(tokens, start=start))
        if self.is_masked:
            rows.append(np.ones(count, bool) if source.mask is None else read_tokens(source.mask, start, count))
        return np.stack([row.astype(np.int32) for row in rows])
