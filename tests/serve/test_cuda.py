"""The programs for a GPU that is not present, compiled by jax's CUDA plugin; skipped where it is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.cuda

# Two layers of Llama 3 8B, or with its feed-forward 8 times and 2 of them for a token (Mixtral).
COMPILE = """
import json, sys
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, build_mesh
from trellax.programs import Target, open_target
from trellax.serve.compiled_programs import compile_programs
from trellax.serve.state import Sizes, state_shapes

tensor, layers, num_experts = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
machine = open_target(Target.parse(f"h200:{tensor}"), num_devices=tensor)
mesh = build_mesh(MeshSpec(tensor=tensor), devices=machine.devices)
config = ModelConfig(
    vocab_size=128256, num_layers=2, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336, max_tokens=2048,
    mlp="swiglu", norm="rmsnorm", positions="rotary", bias="off", embeddings="untied", dtype="bfloat16",
    num_experts=num_experts, experts_per_token=min(num_experts, 2),
)
sizes = Sizes(slots=1, max_tokens=2048, groups=1, num_shards=1, chunk=256, items=2, rounds=2)
state = state_shapes(config, sizes, mesh=mesh, cache_dtype="bfloat16", layers=layers)
programs = compile_programs(config, sizes, mesh=mesh, state=state, layers=layers)
print(json.dumps(programs.decode.memory_analysis().temp_size_in_bytes))
"""


def temporary_bytes(tensor: int, layers: str, *, num_experts: int = 0) -> int:
    """Of decoding, from a process of its own: a target is chosen before jax starts."""
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env["PYTHONPATH"] = str(ROOT / ".src")
    command = [sys.executable, "-c", COMPILE, str(tensor), layers, str(num_experts)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("tensor", [1, 4])
def test_decoding_on_a_gpu_copies_no_weights(tensor: int) -> None:
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) // tensor
    assert temporary_bytes(tensor, "unrolled") < 0.1 * layer


def test_decoding_experts_on_a_gpu_copies_no_weights() -> None:
    experts = 2 * 8 * 3 * 4096 * 14336
    assert temporary_bytes(1, "unrolled", num_experts=8) < 0.01 * experts


def test_a_loop_over_layers_would_copy_them() -> None:
    """Why engines on GPUs do not loop; when this fails they may."""
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert temporary_bytes(1, "loop") > 0.5 * layer
