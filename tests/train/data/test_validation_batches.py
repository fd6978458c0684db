"""A validation reads the same sequences every time, each once, whatever the seed and however few there are."""

import numpy as np
import pytest
from trellax.train.data.batches import Batches
from trellax.train.data.validation_batches import ValidationBatches


def make(num_tokens: int, *, most: int = 3, batch_size: int = 4) -> ValidationBatches:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return ValidationBatches(tokens, seq_len=8, batch_size=batch_size, microbatches=2, max_batches=most)


def weights_of(batches: ValidationBatches) -> dict[int, float]:
    """The weight of every sequence read, by its first token."""
    found: dict[int, float] = {}
    for batch in batches:
        for first, weight in zip(batch["tokens"][..., 0].ravel(), batch["weights"].sum(-1).ravel(), strict=True):
            found[int(first)] = found.get(int(first), 0.0) + float(weight)
    return {first: weight for first, weight in found.items() if weight}


@pytest.mark.parametrize(
    ("num_tokens", "num_batches", "num_sequences"), [(200, 3, 12), (57, 2, 7), (33, 1, 4), (9, 1, 1)]
)
def test_every_sequence_weighs_the_same_and_counts_once(num_tokens: int, num_batches: int, num_sequences: int) -> None:
    batches = make(num_tokens)
    assert (len(batches), batches.num_sequences) == (num_batches, num_sequences)
    weights = weights_of(batches)
    assert len(weights) == num_sequences
    assert list(weights.values()) == pytest.approx([1 / num_sequences] * num_sequences)


def test_batches_are_those_of_training_in_shape_and_type() -> None:
    tokens = np.arange(99, dtype=np.uint8)
    wanted = Batches(tokens, seq_len=8, batch_size=4, microbatches=2, seed=3)[0]
    found = make(30)[0]
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in wanted.items()}
