"""Sequence parallelism equals one device, and what its compiled program sends and keeps."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import pytest
from trellax.layers import Remat, activation_bytes
from trellax.meshes import ShardingError
from trellax.plan.costs.activations import split_backward_bytes
from trellax.schedules import Vocab

from ..programs.steps import report_of, setup_of
from .law import Attention, broken, pipeline_step, small_model

TOLERANCE = 2e-5  # as in test_law.py, for the same reason


WIDE = "--model.hidden_size 64 --model.num_heads 8 --data.seq_len 64 --model.max_tokens 64"


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
    found = broken(
        config,
        tolerance=TOLERANCE,
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
    assert found == {}


@pytest.mark.parametrize("remat", get_args(Remat))
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_what_is_kept_and_sent_between_stages_is_divided_by_tensor(schedule: str, remat: Remat) -> None:
    extra = f"--pipeline.schedule {schedule} --pipeline.remat {remat} {WIDE}"
    whole, split = (report_of("1x4x2", f"{extra} --mesh.sequence {choice}") for choice in ("off", "on"))
    shapes: dict[str, Any] = {"num_sequences": 8, "num_tokens": 64, "tensor": 4, "sequence": "on", "remat": remat}
    model = setup_of("1x4x2", extra).config.model
    kept = activation_bytes(model, **shapes).layer
    kept += split_backward_bytes(model, **shapes) if schedule == "zb-h1" else 0
    # Two layers for each of two microbatches in flight, and what goes into, out of and between stages.
    slots, x = 2 * 2 * kept, activation_bytes(model, **shapes).boundary
    assert slots <= split.memory.activations <= 1.05 * (slots + 4 * x)
    if (schedule, remat) == ("1f1b", "full"):
        assert split.memory.activations == pytest.approx(whole.memory.activations / 4, rel=0.05)
    sent = [{row.axis: row.bytes for row in one.traffic if row.kind == "collective-permute"} for one in (split, whole)]
    assert sent[0]["pipe"] == sent[1]["pipe"] / 4


@pytest.mark.parametrize("whole", [{"ffn": None}, {"heads": None, "kv_heads": None}], ids=str)
def test_layers_that_are_whole_over_tensor_cut_their_tokens(whole: dict[str, None]) -> None:
    config = small_model(style="llama", embeddings="untied")
    sizes: dict[str, Any] = {"mesh": "2x2x2", "schedule": "1f1b", "num_microbatches": 3, "num_sequences": 12}
    assert broken(config, tolerance=TOLERANCE, **sizes, sequence="on", whole=whole) == {}


def test_a_vocabulary_that_is_whole_over_tensor_is_refused() -> None:
    sizes: dict[str, Any] = {"mesh": "2x2x2", "schedule": "1f1b", "num_microbatches": 2, "num_sequences": 8}
    with pytest.raises(ShardingError, match="does not split the vocabulary"):
        pipeline_step(small_model(), **sizes, sequence="on", whole={"vocab": None})
