"""The benchmark of `trellax data prepare` measures a command with all its processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.preparing.run import run, write_lines

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_file_has_the_size_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lines(tmp_path / name, 20_000)
    lines = (tmp_path / "a").read_text().splitlines()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size >= 20_000
    assert [json.loads(line)["id"] for line in lines] == list(range(len(lines)))


@pytest.mark.slow
def test_memory_is_that_of_all_processes() -> None:
    child = "x = bytearray(60_000_000); import time; time.sleep(3)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = run("two processes", [sys.executable, "-c", parent])
    assert 60e6 < found.resident_bytes < 160e6
    assert found.wall_s > 3 > found.cpu_s > 0


@pytest.mark.slow
def test_benchmark_prints_what_it_measured() -> None:
    words = [str(ROOT / "benchmarks/preparing/run.py"), "--megabytes", "3", "--tokenizer", "300", "--shard-mib", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT / ".src")}
    done = subprocess.run([sys.executable, *words, "--json"], capture_output=True, text=True, check=True, env=env)
    (found,) = json.loads(done.stdout[done.stdout.index("[") :])
    assert found["name"] == "trellax data prepare"
    assert found["resident_bytes"] > 50e6
