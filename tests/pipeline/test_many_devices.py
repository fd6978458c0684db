"""Meshes of four axes on 16 devices and of five on 32 equal one device, in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trellax.meshes import MeshSpec

ROOT = Path(__file__).parents[2]

RUN = """
import json, sys
from tests.pipeline.test_context import Case, found_in
print(json.dumps(found_in(Case(**json.loads(sys.argv[1])))))
"""

CASES: tuple[dict[str, Any], ...] = (
    {"mesh": "data=2,context=2,tensor=2,pipe=2", "schedule": "zb-h1", "sequence": "on", "packed": "on"},
    {"mesh": "data=2,context=2,tensor=2,pipe=2", "shard": "layer", "sequence": "on", "vocab": "split", "window": 5},
    {"mesh": "context=4,tensor=2,pipe=2", "schedule": "interleaved-1f1b", "num_chunks": 2, "packed": "on"},
    {"mesh": "context=2,expert=2,tensor=2,pipe=2", "experts": "on", "sequence": "on"},
    {"mesh": "data=2,context=2,expert=2,pipe=2", "experts": "on", "schedule": "zb-v", "num_chunks": 2},
    {"mesh": "context=2,context_expert=2,tensor=2,pipe=2", "experts": "on", "sequence": "on", "packed": "on"},
    {"mesh": "data=2,expert=2,context_expert=2,tensor=2,pipe=2", "experts": "on", "sequence": "on", "shard": "layer"},
    {"mesh": "data=2,context=2,expert=2,tensor=2,pipe=2", "experts": "on", "sequence": "on", "shard": "layer"},
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["mesh"].replace(",", "-"))
def test_many_devices_equal_one(case: dict[str, Any]) -> None:
    num_devices = MeshSpec.parse(case["mesh"]).num_devices
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={num_devices}")
    # A thread for each device that waits, and some that work.
    env = {**os.environ, "XLA_FLAGS": flags, "NPROC": f"{num_devices + 2}", "PYTHONPATH": f"{ROOT / '.src'}:{ROOT}"}
    command = [sys.executable, "-c", RUN, json.dumps(case)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
