"""A step of a mixture of experts for absent GPUs: what it sends, and that no expert is multiplied with all tokens."""

import math
from pathlib import Path

import pytest
from trellax.meshes.scopes import RARELY
from trellax.programs.hlo import HloModule, leaves

from .test_cuda import inspect

pytestmark = pytest.mark.cuda

EXPERTS, CHOSEN, WIDTH, FEATURES, LAYERS, SEQ = 64, 8, 1024, 512, 4, 4096
SIZES = (
    f"--model.num_experts {EXPERTS} --model.experts_per_token {CHOSEN} --model.expert_size {FEATURES} "
    f"--model.hidden_size {WIDTH} --model.num_layers {LAYERS} --model.num_heads 8 --model.num_kv_heads 8 "
    f"--model.max_tokens {SEQ} --data.seq_len {SEQ} --model.dtype bfloat16 --train.batch_size 32 "
    "--pipeline.microbatches 2 --pipeline.remat dots --model.expert_capacity 1.0"
)


@pytest.mark.parametrize(
    ("mesh", "axis", "parts", "sequences"),
    [
        ("--mesh.expert 8", "expert", 8, 2),
        ("--mesh.expert 4 --mesh.tensor 2", "expert", 4, 4),
        # Of 16 sequences a device has an eighth of the tokens.
        ("--mesh.context_expert 8 --pipeline.context_attention gather", "context_expert", 8, 2),
        ("--mesh.expert 2 --mesh.context_expert 4", "expert+context_expert", 8, 2),
    ],
)
def test_tokens_travel_to_their_experts_and_back(
    mesh: str, axis: str, parts: int, sequences: int, tmp_path: Path
) -> None:
    report = inspect(f"tiny-moe h200:8 {mesh} {SIZES}", hlo=str(tmp_path / "step.hlo"))
    traffic = report["traffic"]
    assert isinstance(traffic, list)
    (sent,) = (row for row in traffic if (row["axis"], row["kind"]) == (axis, "all-to-all"))
    # b s k h (e - 1) / e bytes in bfloat16 a direction, for 2 microbatches: there and back, forward and backward.
    pairs = sequences * SEQ * CHOSEN * WIDTH * 2
    assert sent["count"] == 4 * LAYERS * 2
    assert sent["bytes"] == 4 * LAYERS * 2 * pairs * (parts - 1) / parts
    # Products with the chosen experts alone, each pair once: with all of them they would be eight times as many.
    flops, model_flops = report["flops"], report["model_flops"]
    assert isinstance(flops, dict)
    assert isinstance(model_flops, float)
    assert model_flops <= flops["matrix"] <= 1.1 * model_flops
    # No array has as many numbers as all experts of a device would make of all tokens.
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    tokens, own = sequences * SEQ, EXPERTS // parts
    pairs_of_all = max(CHOSEN * tokens * max(WIDTH, FEATURES), LAYERS * own * WIDTH * FEATURES)
    arrays = (leaf for _, i in program.instructions() for leaf in leaves(i.type))
    of_rows = [leaf for leaf in arrays if own in leaf.dims and leaf.dims[-1] in (WIDTH, FEATURES)]
    # Kept for the backward are those of all layers.
    assert max(math.prod(leaf.dims) for leaf in of_rows) <= LAYERS * pairs_of_all


def test_backward_of_the_first_round_begins_when_further_rounds_are_done(tmp_path: Path) -> None:
    """Else its arrays of rows wait beside those of further rounds, up to four as XLA orders them."""
    inspect(f"tiny-moe h200:8 --mesh.expert 8 {SIZES}", hlo=str(tmp_path / "step.hlo"))
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    found = []
    for computation in program.computations.values():
        # A scheduled program lists instructions in the order in which they start.
        run = [i for i in computation.instructions.values() if i.opcode == "while" or "all-to-all" in i.opcode]
        loops = [n for n, i in enumerate(run) if i.opcode == "while" and f"{RARELY}/while" in i.op_name]
        if not loops or any("jvp()" in i.op_name for i in run):
            continue
        found.append([i.opcode for i in run[: loops[0]]])
    assert found == [[]]
