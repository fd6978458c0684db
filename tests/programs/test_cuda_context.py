"""Context parallel steps compiled for GPUs that are not present: which kernel runs, what is sent, and never made."""

import re
from collections import Counter
from pathlib import Path

import pytest

from .test_cuda import inspect
from .test_cuda_shard import sent

pytestmark = pytest.mark.cuda

SEQ = 2048
STEP = (
    f"quickstart h200:8 --mesh.data 1 --mesh.context 2 --model.dtype bfloat16 --model.max_tokens {SEQ} "
    f"--data.seq_len {SEQ} --train.batch_size 32 --pipeline.microbatches 4"
)


@pytest.mark.parametrize(
    ("extra", "calls"),
    [
        # On the diagonal, and in the loop over the other pairs of chunks.
        ("--pipeline.context_attention gather", 2),
        ("--pipeline.context_attention ulysses", 1),
        # jax has no documents in this kernel.
        ("--pipeline.context_attention gather --data.packing on", 0),
    ],
)
def test_attention_over_context_is_fused_where_cudnn_has_its_mask(extra: str, calls: int, tmp_path: Path) -> None:
    report = inspect(f"{STEP} {extra}", hlo=str(tmp_path / "step.hlo"))
    text = (tmp_path / "step.hlo").read_text()
    found = Counter(re.findall(r'custom_call_target="__cudnn\$fmha(\w+)"', text))
    # Outputs and sums of the kernel are kept, so its forward does not run again in the backward.
    assert found == ({"Softmax": calls, "SoftmaxBackward": calls} if calls else {})
    assert report["fits"] is True
    # Scores have batch and heads beside queries and keys: at most those of a pair of chunks of 512, whose blocks XLA
    # joins where they are as small as here.
    shapes = re.findall(r"(?:f32|bf16|pred)\[([\d,]+)\]", text)
    dims = [sorted(map(int, shape.split(","))) for shape in shapes]
    assert [own for own in dims if len(own) > 3 and own[-2] > SEQ // 4] == []


def test_8b_with_sequences_of_128k_fits_32_gpus_and_sends_what_the_formula_says() -> None:
    tokens, layers, microbatches = 131_072, 16, 4
    report = inspect(
        "llama3-8b-8gpu h200:32 --mesh.data 1 --mesh.context 8 --mesh.tensor 2 --mesh.pipe 2 --train.batch_size 4 "
        f"--model.max_tokens {tokens} --data.seq_len {tokens} --pipeline.microbatches {microbatches} "
        "--pipeline.context_attention gather --train.shard step --data.paths README.md"
    )
    assert report["fits"] is True
    # Keys and values of half the heads in bfloat16, of a layer and microbatch; and weights once, 7/8 of 2 bytes.
    once = 2 * tokens * 512 * 2 * 7 / 8 * layers * microbatches
    weights = 8.03e9 / (2 * 2) * 7 / 8
    found = sent(report, "context")
    assert found["all-gather"] == pytest.approx(2 * once + 2 * weights, rel=0.01)
    assert found["reduce-scatter"] == pytest.approx(once + 4 * weights, rel=0.01)
