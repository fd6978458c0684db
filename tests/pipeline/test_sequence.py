"""Sequence parallelism equals one device, and what its compiled program sends and keeps."""

from dataclasses import dataclass
from typing import Literal

import pytest
from trellax.layers import Remat
from trellax.schedules import Vocab

from .law import Attention, answer_of, beyond, errors_of, one_device, pipeline_step, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason


@dataclass(frozen=True)
class Case:
    mesh: str
    schedule: str
    num_microbatches: int
    style: str
    attention: Attention
    embeddings: Literal["tied", "untied"]
    vocab: Vocab = "ends"
    remat: Remat = "none"
    num_chunks: int = 1

    def __str__(self) -> str:
        model = f"{self.style}-{self.attention}-{self.embeddings}-{self.vocab}-{self.remat}"
        return f"{self.mesh}-{self.schedule}-m{self.num_microbatches}-{model}"


CASES = (
    Case("1x8x1", "1f1b", 3, "gpt", "mqa", "tied"),
    Case("2x2x2", "1f1b", 3, "gpt", "mha", "untied", "split", "dots"),
    Case("2x2x2", "zb-h1", 5, "qwen", "gqa", "tied", "split"),
    Case("1x4x2", "interleaved-1f1b", 3, "llama", "gqa", "untied", "ends", "full", 2),
    Case("1x2x4", "zb-v", 5, "llama", "mha", "tied", "ends", "dots", 2),
)

MORE_CASES = tuple(
    Case(mesh, schedule, m, style, attention, embeddings, vocab, remat, chunks)
    for number, (mesh, (schedule, chunks), m) in enumerate(
        (mesh, kind, m)
        for mesh in ("2x2x2", "4x2x1", "1x4x2", "1x2x4")
        for kind in (("1f1b", 1), ("interleaved-1f1b", 2), ("zb-h1", 1), ("zb-v", 2), ("v-min", 2))
        for m in (1, 3, 5)
    )
    if not mesh.endswith("x1") or schedule == "1f1b"
    for style, attention in ((("gpt", "mqa"), ("llama", "gqa"), ("qwen", "mha"))[number % 3],)
    for embeddings in (("tied", "untied")[number % 2],)
    for vocab in (("ends", "split")[number // 2 % 2],)
    for remat in (("none", "dots", "full")[number // 3 % 3],)
)


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=str
)
def test_sequence_parallel_equals_one_device(case: Case) -> None:
    config = small_model(style=case.style, attention=case.attention, embeddings=case.embeddings)
    step = pipeline_step(
        config,
        mesh=case.mesh,
        schedule=case.schedule,
        num_microbatches=case.num_microbatches,
        num_sequences=4 * case.num_microbatches,
        num_chunks=case.num_chunks,
        vocab=case.vocab,
        sequence="on",
        remat=case.remat,
        bubbles="nan",
    )
    expected = one_device(config, 4 * case.num_microbatches)
    assert beyond(errors_of(answer_of(step), expected), tolerance=TOLERANCE) == {}
