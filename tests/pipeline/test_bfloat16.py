"""In bfloat16 a pipeline equals one device up to the rounding of bfloat16.

XLA aborts the process where it cannot compile a bfloat16 reduction in a partly manual region, and an abort cannot be
caught: each step runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

STEP = """
import json
from tests.pipeline.law import answer_of, one_device, pipeline_step, relative_distances, small_model

config = small_model(style={style!r}, dtype="bfloat16")
sizes = {{"num_microbatches": 4, "num_sequences": 16}}
step = pipeline_step(config, mesh={mesh!r}, schedule={schedule!r}, vocab={vocab!r}, **sizes)
print(json.dumps(relative_distances(answer_of(step), one_device(config, 16))))
"""


def distances(*, mesh: str, schedule: str, style: str, vocab: str) -> dict[str, float]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / ".src")])
    done = subprocess.run(
        [sys.executable, "-c", STEP.format(mesh=mesh, schedule=schedule, style=style, vocab=vocab)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("mesh", "schedule", "style", "vocab"),
    [
        pytest.param("2x2x2", "1f1b", "gpt", "ends", marks=pytest.mark.slow),
        ("1x2x4", "zb-h1", "llama", "split"),
        pytest.param("4x1x2", "gpipe", "llama", "split", marks=pytest.mark.slow),
        pytest.param("1x2x4", "naive", "gpt", "split", marks=pytest.mark.slow),
        pytest.param("2x4x1", "1f1b", "llama", "ends", marks=pytest.mark.slow),
    ],
)
def test_step_in_bfloat16_equals_one_device(mesh: str, schedule: str, style: str, vocab: str) -> None:
    found = distances(mesh=mesh, schedule=schedule, style=style, vocab=vocab)
    # A bfloat16 has 8 bits, so one rounding is off by up to 2^-9 = 0.2%. After eight layers forward and back, one
    # device in bfloat16 is 3% away from one in float32 in the worst gradient, and so are two orders of summation
    # from each other. A gradient without the share of a rank would be off by 50% or more.
    loss = found.pop("loss")
    assert loss <= 2e-2
    assert {name: error for name, error in found.items() if not error <= 5e-2} == {}
