"""`trellax runs` says how each run stands, from its files alone; `compare` puts runs side by side."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trellax.commands.cli import main

Golden = Callable[[str, str], None]
DEAD = 2**22 + 1
"""No process: Linux numbers them up to 2**22."""


def make_run(name: str, *, losses: list[float], ended: str = "", holder: Any = None, **config: Any) -> Path:
    folder = Path("runs") / name
    (folder / "checkpoints").mkdir(parents=True)
    lines = [{"step": 10 * i, "loss": loss, "tokens_per_s": 1000.0 + i} for i, loss in enumerate(losses, 1)]
    lines += [{"step": lines[-1]["step"], "val_loss": losses[-1] + 0.5}] if ended == "done" else []
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if ended:
        values = {"ended": ended, "steps": 10 * len(losses), "final_train_loss": losses[-1], "final_val_loss": None}
        values |= {"tokens_per_s": 1234.5, "wall_time_s": 1.0, "mesh": "data=1", "schedule": "none", "folder": name}
        (folder / "summary.json").write_text(json.dumps(values))
    (folder / "lock").write_text(json.dumps(holder) if holder else "")
    rate, seed = config.get("rate", 0.001), config.get("seed", 0)
    (folder / "config.toml").write_text(
        f'[run]\nname = "{name}"\nseed = {seed}\n[train]\nsteps = 40\n[optimizer]\nlearning_rate = {rate}\n'
    )
    for number, file in enumerate(folder.iterdir()):
        os.utime(file, (number, 1_700_000_000))
    return folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    host = socket.gethostname()
    make_run("a-done", losses=[4.0, 3.0, 2.0, 1.5], ended="done")
    make_run("b-stopped", losses=[4.0, 3.5], ended="SIGTERM", rate=0.01, seed=3)
    make_run("c-running", losses=[4.0], holder={"process": os.getpid(), "host": host})
    make_run("d-killed", losses=[4.0], holder={"process": DEAD, "host": host})
    make_run("e-elsewhere", losses=[4.0], holder={"process": DEAD, "host": "another-host"})
    make_run("f-failed", losses=[4.0, 9.0])
    make_run("g-new", losses=[])
    (Path("runs") / "no-run").mkdir()
    yield
    monkeypatch.undo()
    time.tzset()


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    assert main(["runs", "--json"]) == 0
    return {row["name"]: row["state"] for row in json.loads(capsys.readouterr().out)}


def test_runs_are_listed_with_their_states(capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    assert main(["runs"]) == 0
    golden("commands/runs.txt", capsys.readouterr().out)


def test_run_that_went_on_after_its_summary_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert states(capsys)["a-done"] == "done"
    with Path("runs/a-done/metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "loss": 1.0}\n')
    assert states(capsys)["a-done"] == "failed"


def test_comparison_has_what_differs(capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    assert main(["runs", "compare", "runs/a-done", "runs/b-stopped", "--png", "both.png"]) == 0
    golden("commands/runs_compare.txt", capsys.readouterr().out)
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")
    assert main(["runs", "compare", "runs/a-done", "runs/b-stopped", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["config"] == {"run.seed": [0, 3], "optimizer.learning_rate": [0.001, 0.01]}
    assert found["losses"] == {"10": [4.0, 4.0], "20": [3.0, 3.5]}


MISTAKES = {
    "no_folder": ["absent"],
    "no_run": ["compare", "runs/a-done", "runs/b-stoped"],
    "one_run": ["compare", "runs/a-done"],
    "two_folders": ["runs", "others"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_folders_that_are_no_runs_are_told(name: str, capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    assert main(["runs", *MISTAKES[name]]) == 2
    golden(f"errors/commands/runs_{name}.txt", capsys.readouterr().err)


def test_list_needs_no_jax() -> None:
    code = "import sys; from trellax.commands.cli import main; main(['runs']); sys.exit('jax' in sys.modules)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
