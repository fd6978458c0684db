"""`trellax sweep` trains a grid as runs beside each other, goes on where it stopped, and prints one table."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main

Golden = Callable[[str, str], None]
SWEEP = ["sweep", "tiny-dense", "--data.source", "text", "--data.paths", "corpus.txt", "--optimizer.warmup_steps", "1"]
SWEEP += ["--mesh.data", "8", "--train.batch_size", "8", "--train.steps", "2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))


@pytest.mark.slow
def test_grid_is_trained_as_runs_beside_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    grid = ["--grid", "optimizer.learning_rate=1e-4,3e-2", "--grid", "run.seed=0,1"]
    assert main([*SWEEP, *grid]) == 0
    head, *rows, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["learning_rate", "seed", "state", "step", "loss", "val", "loss", "tokens/s"]
    assert [row.split()[:4] for row in rows] == [
        [rate, seed, "done", "2"] for rate in ("1e-4", "3e-2") for seed in "01"
    ]
    assert sum(row.endswith(" best") for row in rows) == 1
    sweep = Path("runs/tiny-dense-sweep")
    assert last.startswith(f"{sweep}: sweep.json, loss.png")
    found = json.loads((sweep / "sweep.json").read_text())
    assert [Path(row["folder"]).name for row in found][:2] == ["learning_rate=1e-4,seed=0", "learning_rate=1e-4,seed=1"]
    assert found[0]["train_loss"] != found[2]["train_loss"] != found[3]["train_loss"]
    assert (sweep / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_same_command_goes_on_with_the_runs_that_are_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*SWEEP, "--grid", "run.seed=0", "--name", "own", "--json"]) == 0
    (first,) = json.loads(capsys.readouterr().out)
    saved = Path(first["folder"]) / "summary.json"
    before = saved.stat().st_mtime_ns
    assert main([*SWEEP, "--grid", "run.seed=0,5", "--name", "own", "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert saved.stat().st_mtime_ns == before
    assert (both[0], both[1]["values"]) == (first, {"run.seed": "5"})


@pytest.mark.slow
def test_run_that_fails_does_not_end_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    # Beside the limits of float32: the weights of the first step are infinite.
    assert main([*SWEEP, "--grid", "optimizer.learning_rate=1e38,1e-3"]) == 2
    printed = capsys.readouterr()
    assert "RunError: " in printed.err
    states = [re.split(r"  +", row)[1] for row in printed.out.splitlines()[1:3]]
    assert states == ["failed", "done"]


MISTAKES = {
    "no_values": ["--grid", "optimizer.learning_rate"],
    "value_empty": ["--grid", "train.init_from=,base"],
    "value_twice": ["--grid", "run.seed=1,1"],
    "folder_elsewhere": ["--grid", "run.seed=1,2", "--name", "../x"],
    "unknown_key": ["--grid", "train.lr=1e-4,3e-4"],
    "bad_combination": ["--grid", "train.batch_size=8,12"],
    "no_weights": ["--grid", "model.lora_rank=0,4"],
    "too_many": ["--grid", "run.seed=" + ",".join(map(str, range(1_001)))],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_grid_that_cannot_be_trained_is_told_before_a_run(
    name: str, capsys: pytest.CaptureFixture[str], golden: Golden
) -> None:
    assert main([*SWEEP, *MISTAKES[name]]) == 2
    golden(f"errors/commands/sweep_{name}.txt", capsys.readouterr().err)
    assert not Path("runs").exists()
