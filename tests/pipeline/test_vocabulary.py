"""A vocabulary that the mesh does not divide is padded, and the step equals one device's on every mesh."""

from dataclasses import replace
from typing import Any, Literal

import pytest
from trellax.schedules import Vocab

from .law import broken, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

CASES: dict[str, tuple[str, Vocab, Literal["tied", "untied"], dict[str, Any]]] = {
    "2x2x2": ("2x2x2", "split", "tied", {"schedule": "1f1b"}),
    "1x4x1": ("1x4x1", "ends", "untied", {"schedule": "gpipe"}),
    "1x1x4": ("1x1x4", "split", "untied", {"schedule": "zb-h1"}),
    "1x4x2": ("1x4x2", "ends", "tied", {"schedule": "1f1b"}),
    "interleaved": ("1x2x4", "split", "tied", {"schedule": "interleaved-1f1b", "num_chunks": 2}),
    "v": ("2x1x4", "split", "tied", {"schedule": "zb-v", "num_chunks": 2}),
    "sequence": ("2x4x1", "ends", "tied", {"schedule": "1f1b", "sequence": "on"}),
    "weights split": ("2x2x2", "split", "untied", {"schedule": "1f1b", "shard": "layer"}),
}


LARGE = [(50257, "2x2x2"), (50257, "1x4x1"), (50257, "1x1x4")]


@pytest.mark.slow
@pytest.mark.parametrize(("num_words", "name"), [*((257, name) for name in CASES), *LARGE])
def test_step_with_a_padded_vocabulary_equals_one_device(name: str, num_words: int) -> None:
    mesh, vocab, embeddings, step = CASES[name]
    config = replace(small_model(embeddings=embeddings), vocab_size=num_words, logit_softcap=5.0)
    sizes: dict[str, Any] = {"num_sequences": 32, "num_microbatches": 4}
    assert broken(config, tolerance=TOLERANCE, mesh=mesh, vocab=vocab, **sizes, **step) == {}
