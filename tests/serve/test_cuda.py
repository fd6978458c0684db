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
from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import HloModule
from trellax.programs.work import count_work
from trellax.serve.compiled_programs import compile_programs
from trellax.serve.state import Sizes, state_shapes

tensor, pipe, num_experts, max_tokens, slots = map(int, sys.argv[3:])
layers, weights, num_devices = sys.argv[1], sys.argv[2], tensor * pipe
machine = open_target(Target.parse(f"h200:{num_devices}"), num_devices=num_devices)
mesh = build_mesh(MeshSpec(tensor=tensor, pipe=pipe), devices=machine.devices)
config = ModelConfig(
    vocab_size=128256, num_layers=2, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336,
    max_tokens=max_tokens, mlp="swiglu", norm="rmsnorm", positions="rotary", bias="off", embeddings="untied",
    dtype="bfloat16", num_experts=num_experts, experts_per_token=min(num_experts, 2),
)
sizes = Sizes(slots=slots, max_tokens=max_tokens, groups=pipe, num_shards=1, chunk=256, items=2, rounds=2)
state = state_shapes(config, sizes, mesh=mesh, cache_dtype="bfloat16", layers=layers)
programs = compile_programs(config, sizes, mesh=mesh, state=state, layers=layers, weights=weights)
program, parts = HloModule.parse(programs.decode.as_text()), {"block": 0, "layers": 0, "others": 0}
for one in count_work(program, count_executions(program, num_devices=num_devices), num_devices=num_devices).operations:
    in_layers = "layers" if "/layers/" in one.op_name else "others"
    parts["block" if "attend/while/body" in one.op_name else in_layers] += one.moved_bytes * int(one.count[0])
print(json.dumps({"temporary": programs.decode.memory_analysis().temp_size_in_bytes} | parts))
"""


def bytes_of_decoding(
    tensor: int,
    layers: str,
    *,
    pipe: int = 1,
    num_experts: int = 0,
    max_tokens: int = 2048,
    slots: int = 1,
    weights: str = "plain",
) -> dict[str, int]:
    """Temporary bytes, and bytes moved in a tick with one block of the cache in each layer.

    From a process of its own: a target is chosen before jax starts.
    """
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env["PYTHONPATH"] = str(ROOT / ".src")
    numbers = map(str, (tensor, pipe, num_experts, max_tokens, slots))
    command = [sys.executable, "-c", COMPILE, layers, weights, *numbers]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("tensor", [1, 4])
def test_decoding_on_a_gpu_copies_no_weights(tensor: int) -> None:
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) // tensor
    assert bytes_of_decoding(tensor, "unrolled")["temporary"] < 0.1 * layer


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_decoding_reads_quantized_weights_as_bytes(weights: str) -> None:
    """A byte each, and no copy of them in 16 bits: products widen them while they read."""
    kernels = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    found = bytes_of_decoding(1, "unrolled", weights=weights)
    assert found["layers"] < 1.05 * kernels
    assert found["temporary"] < 0.01 * kernels


def test_decoding_experts_on_a_gpu_copies_no_weights() -> None:
    experts = 2 * 8 * 3 * 4096 * 14336
    assert bytes_of_decoding(1, "unrolled", num_experts=8)["temporary"] < 0.01 * experts


def test_a_loop_over_layers_would_copy_them() -> None:
    """Why engines on GPUs do not loop; when this fails they may."""
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert bytes_of_decoding(1, "loop")["temporary"] > 0.5 * layer


def test_decoding_1k_of_32k_tokens_moves_little_more_than_weights_and_used_cache() -> None:
    """Of Llama 3 8B with one slot: 16 times these two layers. The loop over blocks is counted once, and has 4 turns."""
    found = bytes_of_decoding(1, "unrolled", max_tokens=32768)
    moved = 16 * (found["layers"] + 4 * found["block"]) + found["others"]
    weights = 2 * (32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096)
    cached = 2 * 2 * 32 * 1024 * 1024
    assert moved <= 1.05 * (weights + cached)


def test_stages_copy_no_rows_of_the_cache() -> None:
    """Of 4 slots in two groups, each device has one layer; a row of it has 16,384 tokens."""
    row = 2 * 2 * 1024 * 16384
    assert bytes_of_decoding(1, "unrolled", pipe=2, max_tokens=16384, slots=4)["temporary"] < 0.2 * row
