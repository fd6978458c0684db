"""Run files and command lines of a hostile grammar: a refusal names what is wrong in 2 kB, and nothing hangs or breaks.

A sample by default; all with `make slow`. Which cases there are is a function of their numbers.
"""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..configs.mutations import draw_case
from .command_lines import draw_command
from .odd_runs import find_problem, stop_before_work

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of the test's own, with a model in it, where no command begins its work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(ROOT / "tests" / "golden" / "hf" / "gpt2")
    stop_before_work(monkeypatch)
    return tmp_path


def problems_of_configs(seeds: range) -> list[tuple[int, str]]:
    found = []
    for seed in seeds:
        rng = random.Random(seed)
        wanted, content, overrides = draw_case(rng)
        Path("run.toml").write_bytes(content)
        words = [rng.choice(("train", "describe")), "run.toml", *overrides]
        if problem := find_problem(words, wanted=wanted):
            found.append((seed, problem))
    return found


def problems_of_command_lines(seeds: range) -> list[tuple[int, str]]:
    found = []
    for seed in seeds:
        wanted, words = draw_command(random.Random(seed))
        if problem := find_problem(words, wanted=wanted):
            found.append((seed, problem))
        shutil.rmtree("out", ignore_errors=True)
    return found


def test_odd_config_is_an_error_that_names_its_key(folder: Path) -> None:
    assert problems_of_configs(range(100)) == []


def test_odd_command_line_is_an_error_that_names_its_word(folder: Path) -> None:
    assert problems_of_command_lines(range(60)) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_two_thousand_odd_configs(part: int, folder: Path) -> None:
    assert problems_of_configs(range(1_000 + part * 500, 1_500 + part * 500)) == []


@pytest.mark.slow
def test_five_hundred_odd_command_lines(folder: Path) -> None:
    assert problems_of_command_lines(range(1_000, 1_500)) == []


FILES = {
    "named pipe": os.mkfifo,
    "folder": lambda path: Path(path).mkdir(),
    "device": lambda path: Path(path).symlink_to("/dev/zero"),
    "loop": lambda path: Path(path).symlink_to(path),
    "sparse": lambda path: (Path(path).touch(), os.truncate(path, 1 << 34)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", FILES)
def test_path_that_is_not_a_run_file_is_refused_by_name(kind: str, folder: Path) -> None:
    FILES[kind]("odd.toml")
    for command in ("train", "bench-decode"):
        assert find_problem([command, "odd.toml"], wanted=r"odd\.toml") == ""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["foo", "cuda"])
@pytest.mark.parametrize(
    "words",
    ["train tiny-dense", "bench-decode tiny-dense", "generate model --prompt a", "serve model", "plan tiny-dense"],
)
def test_platform_that_is_not_there_is_reported_by_every_command(words: str, platform: str, folder: Path) -> None:
    env = os.environ | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT / ".src")}
    command = [sys.executable, "-m", "trellax.commands.cli", *words.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"MeshError: jax cannot start on JAX_PLATFORMS='{platform}'")
