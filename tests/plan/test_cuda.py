"""Programs for GPUs that are not there, compiled by jax's CUDA plugin; skipped where it is not installed."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trellax.meshes import TargetError
from trellax.plan import list_gpus

ROOT = Path(__file__).parents[2]

LLAMA_405B = (
    "--mesh.data 8 --mesh.pipe 16 --model.num_layers 128 --model.hidden_size 16384 --model.num_heads 128 "
    "--model.ffn_size 53248 --train.batch_size 1024 --pipeline.microbatches 128"
)


def plugin_is_missing() -> bool:
    try:
        return not list_gpus()
    except TargetError:
        return True


pytestmark = pytest.mark.skipif(plugin_is_missing(), reason="needs the CUDA plugin: pip install 'trellax[cuda]'")


RUN = """
import argparse, sys
from trellax.train import load_config
from trellax.train.inspect_command import run_inspect
config, target, *overrides = sys.argv[1:]
run_inspect(load_config(config, overrides), argparse.Namespace(target=target, json=True, hlo=None, png=None))
"""


def inspect(words: str) -> dict[str, object]:
    """The command's JSON, from a process of its own: a target is chosen before jax starts."""
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env["PYTHONPATH"] = str(ROOT / ".src")
    command = [sys.executable, "-c", RUN, *words.split()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_small_step_on_h200() -> None:
    report = inspect("quickstart h200:8")
    assert report["target"] == "NVIDIA H200 141GB HBM3e:8"
    memory = report["memory_bytes"]
    assert isinstance(memory, dict)
    assert memory["gradients"] == memory["parameters"] == 928_256
    assert memory["activations"] > 13 * 10**6
    assert report["fits"] is True
    traffic = report["traffic"]
    assert isinstance(traffic, list)
    ratios = {row["axis"]: round(row["ratio"], 2) for row in traffic if row["ratio"]}
    assert ratios == {"data": 1.0, "pipe": 1.0, "pipe+tensor": 1.0, "tensor": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "limit_s"),
    [
        ("llama3-8b-8gpu h200:8", 300),
        ("llama3-70b-64gpu h100:64/8", 300),
        (f"llama3-70b-64gpu h200:1024 {LLAMA_405B}", 300),
    ],
    ids=["8B on 8", "70B on 64", "405B on 1024"],
)
def test_large_models_compile_in_time_and_say_whether_they_fit(words: str, limit_s: float) -> None:
    report = inspect(words)
    memory, compile_s = report["memory_bytes"], report["compile_s"]
    assert isinstance(memory, dict)
    assert isinstance(compile_s, float)
    assert compile_s < limit_s
    assert report["fits"] == (memory["total"] <= memory["capacity"])
    assert memory["gradients"] == memory["parameters"]
    traffic = report["traffic"]
    assert isinstance(traffic, list)
    assert "unattributed" not in {row["axis"] for row in traffic}
    assert all(math.isfinite(row["bytes"]) for row in traffic)
