"""The programs for a GPU that is not present, compiled by jax's CUDA plugin; skipped where it is not installed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from trellax.layers import ModelConfig
from trellax.plan import Layout, ServeQuestion, read_topology
from trellax.plan.costs.inference_time import trellax_server
from trellax.plan.serving_search import serving_memory

ROOT = Path(__file__).parents[2]


# Two engines of three programs each take minutes where cores are shared.
pytestmark = [pytest.mark.cuda, pytest.mark.timeout(1800)]

# Some layers of Llama 3 8B, or with its feed-forward 8 times and 2 of them for a token (Mixtral).
COMPILE = """
import json, sys
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, build_mesh
from trellax.programs import Target, open_target
from trellax.serve.inspection.report import inspect_serving
from trellax.serve.inspection.tables import serving_numbers
from trellax.serve.state import Sizes

mesh_text, layers, weights, cache_dtype = sys.argv[1:5]
num_layers, num_experts, max_tokens, slots = map(int, sys.argv[5:])
spec = MeshSpec.parse(mesh_text)
machine = open_target(Target.parse(f"h200:{spec.num_devices}"), num_devices=spec.num_devices)
config = ModelConfig(
    vocab_size=128256, num_layers=num_layers, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336,
    max_tokens=max_tokens, mlp="swiglu", norm="rmsnorm", positions="rotary", bias="off", embeddings="untied",
    dtype="bfloat16", num_experts=num_experts, experts_per_token=min(num_experts, 2),
)
sizes = Sizes(
    slots=slots, max_tokens=max_tokens, groups=spec.pipe, num_shards=spec.data, chunk=256, items=2, rounds=2
)
report = inspect_serving(
    config, sizes, mesh=build_mesh(spec, devices=machine.devices), axes=spec.roles, context=1024, layers=layers,
    weights=weights, cache_dtype=cache_dtype, hardware=machine.hardware,
)
temporary = report.compiled.programs.decode.memory_analysis().temp_size_in_bytes
print(json.dumps({"temporary": temporary} | serving_numbers(report)))
"""


@cache
def report_of(
    mesh: str,
    layers: str = "unrolled",
    *,
    num_layers: int = 2,
    num_experts: int = 0,
    max_tokens: int = 2048,
    slots: int = 1,
    weights: str = "plain",
    cache_dtype: str = "bfloat16",
) -> dict[str, Any]:
    """The report of an engine for absent H200, of rows with 1,024 tokens, and temporary bytes of its decoding.

    From a process of its own: a target is chosen before jax starts.
    """
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env["PYTHONPATH"] = str(ROOT / ".src")
    numbers = map(str, (num_layers, num_experts, max_tokens, slots))
    command = [sys.executable, "-c", COMPILE, mesh, layers, weights, cache_dtype, *numbers]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def whole_ratio(mesh: str, *, slots: int = 1) -> float:
    """Bytes of decoding a token of all 32 layers of 8B, 1,024 of 32,768 tokens, over those that must be read.

    Layers are alike: those of two and of four are compiled, and the difference stands for each further two.
    """
    two, four = (report_of(mesh, num_layers=n, max_tokens=32768, slots=slots) for n in (2, 4))

    def all_layers(read: Callable[[dict[str, Any]], float]) -> float:
        return read(two) + 15 * (read(four) - read(two))

    least = all_layers(lambda own: own["least_bytes"]["weights"] + own["least_bytes"]["cache"])
    return all_layers(lambda own: own["decode"]["moved_bytes"]["all"]) / least


@pytest.mark.parametrize("tensor", [1, 4])
def test_decoding_on_a_gpu_copies_no_weights(tensor: int) -> None:
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336) // tensor
    assert report_of(f"tensor={tensor}")["temporary"] < 0.1 * layer


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_decoding_reads_quantized_weights_as_bytes(weights: str) -> None:
    """A byte each, and no copy of them in 16 bits: products widen them while they read."""
    kernels = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    found = report_of("tensor=1", weights=weights)
    assert found["decode"]["moved_bytes"]["layers"] < 1.05 * kernels
    assert found["temporary"] < 0.01 * kernels


def test_decoding_experts_on_a_gpu_copies_no_weights() -> None:
    experts = 2 * 8 * 3 * 4096 * 14336
    assert report_of("tensor=1", num_experts=8)["temporary"] < 0.01 * experts


def test_a_loop_over_layers_would_copy_them() -> None:
    """Why engines on GPUs do not loop; when this fails they may."""
    layer = 2 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    assert report_of("tensor=1", "loop")["temporary"] > 0.5 * layer


@pytest.mark.parametrize(("mesh", "most"), [("tensor=1", 1.05), ("tensor=8", 1.1)])
def test_decoding_1k_of_32k_tokens_moves_little_more_than_weights_and_used_cache(mesh: str, most: float) -> None:
    """With one slot: where a product of one row were written out, it would be three times the weights."""
    assert whole_ratio(mesh) <= most


def test_a_layer_of_decoding_1k_tokens_is_32_kernels() -> None:
    """14 of them for the one block of the cache; with blocks of 256 tokens there were 57."""
    two, four = (report_of("tensor=1", num_layers=n, max_tokens=32768) for n in (2, 4))
    assert four["decode"]["kernels"] - two["decode"]["kernels"] <= 2 * 32


def test_stages_copy_no_rows_of_the_cache() -> None:
    """Of 8 slots in eight groups, each device has one layer; a row of it has 32,768 tokens."""
    row = 2 * 2 * 1024 * 32768
    found = report_of("pipe=8", num_layers=8, max_tokens=32768, slots=8)
    assert found["temporary"] < 0.05 * row
    assert found["decode"]["moved_bytes"]["between"] < 0.05 * row


@pytest.mark.parametrize(("weights", "cache_dtype"), [("int8", "fp8"), ("fp8", "bfloat16")])
def test_memory_is_what_the_planner_says(weights: str, cache_dtype: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 128256, "num_layers": 2, "hidden_size": 4096, "num_heads": 32}
    model = ModelConfig(**sizes, num_kv_heads=8, ffn_size=14336, mlp="swiglu", embeddings="untied", bias="off")
    question = ServeQuestion(
        model=model,
        topology=read_topology("h200x1"),
        requests=1,
        prompt=32767,
        generated=1,
        server=trellax_server(weights=weights, cache_dtype=cache_dtype),
    )
    found = report_of("tensor=1", weights=weights, cache_dtype=cache_dtype, max_tokens=32768)
    assert serving_memory(question, Layout()).total == pytest.approx(found["memory_bytes"]["total"], rel=0.03)
