"""Cut batches out of pairs of answers, each a pure function of the seed and the step, as `../batches.py` does."""

import math
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from .pairs import Pairs

_VALIDATION_SEED = 0


class PairBatches:
    """Index the batches of pairs that repeat without end and are shuffled anew in every epoch.

    `batches[step]` has, for B x M = `batch_size` rows, chosen before rejected, `tokens`, `targets` int32[M, B, T],
    `weights` float32 alike, 1 for a token of an answer, and float32[M, B, 1]: `reference`, the loss of the row by the
    reference, and `shares`, 1 / the number of pairs.

    Args:
        numbers: the pairs to take.
        reference: loss of every row of `pairs` by the reference.
        first_sequence: row at which batch 0 starts, as in `Batches`.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        numbers: Sequence[int],
        reference: np.ndarray,
        seq_len: int,
        batch_size: int,
        microbatches: int,
        seed: int,
        first_sequence: int = 0,
    ) -> None:
        self._pairs, self._reference, self._seq_len = pairs, reference, seq_len
        self._shape = (microbatches, batch_size // microbatches)
        self._batch_size, self._first_sequence = batch_size, first_sequence
        self._order: Any = grain.MapDataset.source(list(numbers)).seed(seed).shuffle().repeat()

    def num_sequences(self, step: int) -> int:
        """Return the index of the first row of batch `step`, counted over all epochs."""
        return self._first_sequence + step * self._batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first, count = self.num_sequences(step) // 2, self._batch_size // 2
        numbers = [int(self._order[first + index]) for index in range(count)]
        rows = [row for number in numbers for row in (2 * number, 2 * number + 1)]
        more = {"reference": self._reference[rows], "shares": np.full(len(rows), 1 / count)}
        return lay_out_rows(self._pairs, rows, seq_len=self._seq_len, shape=self._shape) | {
            name: leaf.astype(np.float32).reshape(*self._shape, 1) for name, leaf in more.items()
        }


class PairValidation:
    """Index at most `max_batches` batches of held-out pairs, each a dict as `PairBatches` gives it.

    Shares sum to 1 over the pairs of all batches; the last one is filled up with pairs of share 0.
    """

    def __init__(self, pairs: Pairs, *, numbers: Sequence[int], batch_size: int, max_batches: int, **more: Any) -> None:
        self._batches = PairBatches(pairs, numbers=numbers, batch_size=batch_size, seed=_VALIDATION_SEED, **more)
        self._batch_size = batch_size
        self.num_sequences = min(2 * len(numbers), max_batches * batch_size)
        """Number of rows in one validation."""

    def __len__(self) -> int:
        return math.ceil(self.num_sequences / self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self):
            raise IndexError(index)
        batch = self._batches[index]
        number = index * self._batch_size + np.arange(self._batch_size)
        shares = (number < self.num_sequences) / (self.num_sequences // 2)
        return batch | {"shares": shares.astype(np.float32).reshape(batch["shares"].shape)}


def lay_out_rows(pairs: Pairs, rows: Sequence[int], *, seq_len: int, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return `tokens`, `targets` and `weights` [M, B, T] of M x B rows."""
    columns = zip(*(pairs.row(row, seq_len=seq_len) for row in rows), strict=True)
    names = ("tokens", "targets", "weights")
    return {name: np.stack(own).reshape(*shape, seq_len) for name, own in zip(names, columns, strict=True)}
