"""Cut the validation batches out of the held-out part of a corpus: the same sequences every time, each once."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .batches import Batches, TokenSource
from .documents import Documents
from .joined_tokens import Tokens

_SEED = 0
"""The same seed in all runs, so that runs of different seeds validate on the same sequences."""


class ValidationBatches:
    """Index at most `max_batches` batches of the held-out part, each a dict as `Batches` gives it.

    Weights sum to 1 over all batches together, so the sum of their losses is the mean over the tokens. A short
    held-out part gives fewer batches; the last one is filled up with sequences of weight 0.

    >>> tokens = np.arange(50, dtype=np.uint8)
    >>> batches = ValidationBatches(tokens, seq_len=8, batch_size=4, microbatches=2, max_batches=5)
    >>> len(batches), batches.num_sequences   # batches of 4 and 3 sequences
    (2, 7)

    Raises:
        DataError: the held-out part has no full sequence, or a batch does not split into microbatches.
    """

    def __init__(
        self,
        tokens: Tokens | Sequence[TokenSource],
        *,
        seq_len: int,
        batch_size: int,
        microbatches: int,
        max_batches: int,
        documents: Documents | None = None,
    ) -> None:
        sizes = {"seq_len": seq_len, "batch_size": batch_size, "microbatches": microbatches}
        self._batches = Batches(tokens, **sizes, seed=_SEED, documents=documents)
        self._batch_size = batch_size
        self.num_sequences = min(self._batches.num_windows, max_batches * batch_size)
        """Number of sequences in one validation."""

    @cached_property
    def _num_predicted(self) -> int:
        """Number of tokens that predict the next, over all batches."""
        return sum(int(self._counted(index).sum()) for index in range(len(self)))

    def _counted(self, index: int) -> np.ndarray:
        """Return which tokens of a batch predict the next and are of the validation's sequences, bool [M, B, T]."""
        weights = self._batches[index]["weights"]
        number = index * self._batch_size + np.arange(self._batch_size)
        return (weights > 0) & (number < self.num_sequences).reshape(*weights.shape[:2], 1)

    def __len__(self) -> int:
        return math.ceil(self.num_sequences / self._batch_size)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if index >= len(self):
            raise IndexError(index)
        weights = self._counted(index) / max(1, self._num_predicted)
        return self._batches[index] | {"weights": weights.astype(np.float32)}
