"""Compiled for absent GPUs, no loop copies a buffer of residuals, which are as large as all else together."""

from pathlib import Path

import pytest
from trellax.programs.hlo import HloModule, leaves

from .test_cuda import LLAMA, inspect

pytestmark = pytest.mark.cuda

SIZES = "--data.seq_len 256 --model.max_tokens 256 --model.num_layers 8 --train.batch_size 64"
OFFLOADED = "--mesh.data 1 --mesh.tensor 2 --mesh.pipe 4 --train.offload residuals --pipeline.microbatches 16"


@pytest.mark.parametrize(
    ("num_layers", "words"),
    [
        # The last layer stands behind the loop over layers, and the backward of the same turn reads its residuals.
        (4, "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --train.shard layer --pipeline.microbatches 16"),
        (8, "--mesh.data 2 --mesh.tensor 4 --mesh.pipe 1 --train.shard layer --pipeline.microbatches 8"),
        (8, "--mesh.data 8 --mesh.tensor 1 --mesh.pipe 1 --train.shard layer --pipeline.microbatches 4"),
        # Residuals leave for the host before others arrive in the same buffers.
        (2, OFFLOADED),
        (2, f"{OFFLOADED} --pipeline.schedule zb-h1"),
    ],
)
def test_no_loop_copies_a_buffer_of_residuals(num_layers: int, words: str, tmp_path: Path) -> None:
    path = tmp_path / "step.hlo"
    inspect(f"{LLAMA} {SIZES} {words}", hlo=str(path))
    program = HloModule.parse(path.read_text())
    # Bodies of loops and what they branch into: copies inside a kernel are none of memory.
    called = [i.called() for _, i in program.instructions() if i.opcode in ("while", "conditional")]
    names = {name for one in called for names in one.values() for name in names}
    # [slots, layers of a stage, ...]: no microbatch here has as many sequences as a stage has layers.
    made = [
        (instruction.opcode, leaf)
        for computation, instruction in program.instructions()
        if computation.name in names
        for leaf in leaves(instruction.type)
        if leaf.dtype == "bf16" and len(leaf.dims) > 3 and leaf.dims[1] == num_layers
    ]
    assert made != []
    assert [leaf for opcode, leaf in made if opcode == "copy"] == []
