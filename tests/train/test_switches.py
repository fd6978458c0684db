"""`trellax train` gives the same losses under jax's options for 64-bit types, promotion, transfers and checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = (
    "train quickstart --fresh --fake-devices 4 --mesh.pipe 2 --mesh.data 2 --mesh.tensor 1 --model.num_layers 2 "
    "--model.hidden_size 32 --model.num_heads 2 --data.seq_len 32 --train.batch_size 8 --train.steps 3 "
    "--pipeline.microbatches 2 --optimizer.warmup_steps 1"
)


def run(folder: Path, **switch: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trellax.commands.cli", *COMMAND.split(), "--run.folder", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | switch, timeout=300, check=False)


def losses(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^step \d+/\d+ +loss ([0-9.]+)", done.stderr, flags=re.MULTILINE)


@pytest.mark.slow
def test_training_is_the_same_under_options_of_jax(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    assert len(losses(plain)) == 3
    for name, value in {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_TRANSFER_GUARD": "disallow",
        "JAX_DEBUG_NANS": "1",
        "JAX_ENABLE_CHECKS": "1",
    }.items():
        done = run(tmp_path / name, **{name: value})
        assert done.returncode == 0, done.stderr
        assert losses(done) == losses(plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("JAX_DISABLE_JIT", "1"), ("JAX_AUTO_PCAST", "0")])
def test_option_that_forbids_training_is_named_in_the_error(tmp_path: Path, name: str, value: str) -> None:
    done = run(tmp_path, **{name: value})
    assert done.returncode == 2
    assert f"{name.lower()}=" in done.stderr
    assert "Traceback" not in done.stderr
