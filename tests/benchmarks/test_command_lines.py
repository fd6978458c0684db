"""Every benchmark describes itself, and says in a sentence what is wrong with its arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = sorted(file.parent.name for file in (ROOT / "benchmarks").glob("*/run.py"))

MISTAKES = {
    "gpu --minutes 0": "argument --minutes: expected a number above 0, got 0",
    "gpu --steps x": "argument --steps: expected a whole number, got 'x'",
    "gpu 2b@2048": "argument CASE: expected SHAPE@TOKENS with a shape of 125m, 1b, 3b, 8b, tiny, got '2b@2048'",
    "overhead --rounds 0": "argument --rounds: expected 1 or more, got 0",
    "planner nowhere": "DataError: nowhere is no folder.",
    "precision --steps 20": "argument --steps: expected 40 or more, two windows of 20 steps, got 20",
    "preparing --beside": "argument --beside: it tokenizes, so give --tokenizer 32768 too",
    "saving --pairs -1": "argument --pairs: expected 1 or more, got -1",
}


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name / "run.py"), *words]
    # The package of this checkout, whichever one is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".src")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_benchmark_describes_itself(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert "--json" in done.stdout


@pytest.mark.parametrize(
    "words",
    # Those that import jax take seconds.
    [
        pytest.param(words, marks=pytest.mark.slow if words.startswith(("precision", "saving")) else ())
        for words in MISTAKES
    ],
)
def test_mistake_is_told_in_a_sentence(words: str) -> None:
    done = run(*words.split())
    assert done.returncode == 2
    assert MISTAKES[words] in done.stderr
    assert "Traceback" not in done.stderr
