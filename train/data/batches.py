"""Batches by step number: which sequences a step sees is a pure function of the seed and the step.

So a run resumes from its step alone, and a run on another mesh sees the same data. Grain shuffles; next: `../step.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np

from ...meshes import DataError
from ...meshes.arguments import check_count
from .file_change import check_size


class Batches:
    """Random access to the batches of an endless, reshuffled corpus.

    `batches[step]` is a dict of `tokens` and `targets` int32[M, B, T] and `weights` float32[M, B, T], where M is
    `microbatches` and B is `batch_size / microbatches`. Weights sum to 1 over a step: the loss of a step is the sum of
    weights x negative log-likelihood, however it is cut. An epoch covers every token; its windows do not overlap but
    for the last, which ends where the corpus ends. Batches run on across epochs, so no sequence is left out.
    `first_sequence` is where in that endless row batch 0 starts; it is not 0, and may be negative, for a run that went
    on with batches of another size.

    >>> batches = Batches(np.arange(100, dtype=np.uint8), seq_len=8, batch_size=4, microbatches=2, seed=0)
    >>> batches[7]["tokens"].shape
    (2, 2, 8)

    Raises:
        DataError: the corpus has no full sequence, or the batch does not split into microbatches.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        microbatches: int,
        seed: int,
        first_sequence: int = 0,
    ) -> None:
        for name, count in {"seq_len": seq_len, "batch_size": batch_size, "microbatches": microbatches}.items():
            check_count(name, count, error=DataError)
        check_count("seed", seed, error=DataError, least=0)
        check_count("first_sequence", first_sequence, error=DataError, least=None)
        if tokens.size < seq_len + 1:
            raise DataError(
                f"{tokens.size} tokens hold no sequence of {seq_len}, which needs {seq_len + 1} with its targets.",
                fix="use more text or a shorter data.seq_len.",
            )
        if batch_size % microbatches:
            raise DataError(
                f"a batch of {batch_size} sequences does not split into {microbatches} microbatches.",
                fix="make batch_size a multiple of microbatches.",
            )
        windows = _Windows(tokens=tokens, seq_len=seq_len)
        self._rows = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        self._shape = (microbatches, batch_size // microbatches, seq_len)
        self._batch_size, self._first_sequence = batch_size, first_sequence
        self.num_windows = len(windows)
        """Sequences of one epoch."""

    def num_sequences(self, step: int) -> int:
        """Return how many sequences of the endless row come before batch `step`."""
        return self._first_sequence + step * self._batch_size

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        start = self.num_sequences(step)
        rows = np.stack([np.asarray(self._rows[start + row]) for row in range(self._batch_size)])
        weights = np.full(self._shape, 1 / np.prod(self._shape), np.float32)
        return {
            "tokens": rows[:, :-1].reshape(self._shape),
            "targets": rows[:, 1:].reshape(self._shape),
            "weights": weights,
        }


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """The corpus as windows of seq_len + 1 tokens: each window's targets end where the next one's tokens begin."""

    tokens: np.ndarray
    seq_len: int

    def __len__(self) -> int:
        return (self.tokens.size - 2) // self.seq_len + 1

    def __getitem__(self, index: int) -> np.ndarray:
        start = min(index * self.seq_len, self.tokens.size - 1 - self.seq_len)
        return _read(self.tokens, start, self.seq_len + 1).astype(np.int32)


def _read(tokens: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return tokens[start : start + count], of a mapped file by reading it.

    Touching a map whose file was cut short kills the process, in whatever moment before that one looked.

    Raises:
        DataError: the file has gone or changed its size.
    """
    if not isinstance(tokens, np.memmap):
        return tokens[start : start + count]
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
