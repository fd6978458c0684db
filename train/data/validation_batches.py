"""The held-out batches of a run: the same sequences at every validation, each counted once, whatever the seed."""

import math

import numpy as np

from .batches import Batches

_SEED = 0
"""Of all runs: with a seed's own windows, the losses of two seeds could not be compared."""


class ValidationBatches:
    """At most `most` batches of the held-out part, as `Batches` has them.

    Weights sum to 1 over all batches, so that the sum of their losses is the mean over the sequences read. Where the
    part has fewer sequences than `most` batches, there are fewer batches, and what fills up the last one weighs 0.

    >>> batches = ValidationBatches(np.arange(50, dtype=np.uint8), seq_len=8, batch_size=4, microbatches=2, most=5)
    >>> len(batches), batches.num_sequences
    (2, 7)

    Raises:
        DataError: the part has no full sequence, or a batch does not split into microbatches.
    """

    def __init__(self, tokens: np.ndarray, *, seq_len: int, batch_size: int, microbatches: int, most: int) -> None:
        self._batches = Batches(tokens, seq_len=seq_len, batch_size=batch_size, microbatches=microbatches, seed=_SEED)
        self._batch_size = batch_size
        self.num_sequences = min(self._batches.num_windows, most * batch_size)
        """Sequences of one validation."""

    def __len__(self) -> int:
        return math.ceil(self.num_sequences / self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self):
            raise IndexError(index)
        batch = self._batches[index]
        shape = batch["weights"].shape
        number = index * self._batch_size + np.arange(self._batch_size)
        weight = np.where(number < self.num_sequences, 1 / (self.num_sequences * shape[-1]), 0)
        weights = np.broadcast_to(weight.reshape(*shape[:2], 1), shape)
        return batch | {"weights": weights.astype(np.float32)}
