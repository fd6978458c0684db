"""Cut the validation batches out of the held-out part of a corpus: the same sequences every time, each once."""

import math

import numpy as np

from .batches import Batches

_SEED = 0
"""The same seed in all runs, so that runs of different seeds validate on the same sequences."""


class ValidationBatches:
    """Index at most `max_batches` batches of the held-out part, each a dict as `Batches` gives it.

    Weights sum to 1 over all batches together, so the sum of their losses is the mean over the sequences. A short
    held-out part gives fewer batches; the last one is filled up with sequences of weight 0.

    >>> tokens = np.arange(50, dtype=np.uint8)
    >>> batches = ValidationBatches(tokens, seq_len=8, batch_size=4, microbatches=2, max_batches=5)
    >>> len(batches), batches.num_sequences   # batches of 4 and 3 sequences
    (2, 7)

    Raises:
        DataError: the held-out part has no full sequence, or a batch does not split into microbatches.
    """

    def __init__(
        self, tokens: np.ndarray, *, seq_len: int, batch_size: int, microbatches: int, max_batches: int
    ) -> None:
        self._batches = Batches(tokens, seq_len=seq_len, batch_size=batch_size, microbatches=microbatches, seed=_SEED)
        self._batch_size = batch_size
        self.num_sequences = min(self._batches.num_windows, max_batches * batch_size)
        """Number of sequences in one validation."""

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
