"""The command line: results on stdout, talk on stderr, exit code 2 and no traceback for a user's mistake."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main

MISTAKES = {
    "no_command": "",
    "unknown_command": "trian configs/quickstart.toml",
    "no_config": "train",
    "missing_config": "train quickstrat",
    "unknown_option": "train quickstart --jsno",
    "unknown_key": "train quickstart --train.stpes 5",
    "override_without_value": "train quickstart --train.steps",
    "wrong_type": "train quickstart --train.steps ten --mesh.data 2.5",
    "fake_devices": "train quickstart --fake-devices many",
    "no_fake_devices": "train quickstart --fake-devices 0 --mesh.data 3",
    "mesh_does_not_fit": "train quickstart --fake-devices 8 --mesh.data 3",
    "heads_over_tensor": "train quickstart --mesh.tensor 8 --mesh.data 1 --mesh.pipe 1 --model.num_heads 2",
    "layers_over_pipe": "train quickstart --mesh.pipe 8 --mesh.data 1 --mesh.tensor 1",
    "batch_over_microbatches": "train quickstart --pipeline.microbatches 5",
    "no_microbatches": "train quickstart --pipeline.microbatches 0",
    "unknown_schedule": "train quickstart --pipeline.schedule 1fb1",
    "missing_corpus": "train quickstart --data.source text --data.paths nowhere.txt",
    "started_with_other_devices": "train quickstart --fake-devices 4 --mesh.data 1",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_with_exit_code_2_and_a_way_out(
    name: str, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(MISTAKES[name].split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/cli_{name}.txt", err)


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "train.batch_size" in out
    assert "pipeline.schedule" in out


def test_describe_shows_mesh_shardings_and_schedule(
    golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", "quickstart"]) == 0
    golden("describe_quickstart.txt", capsys.readouterr().out)


def test_describe_gives_scripts_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "quickstart", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["mesh"], numbers["devices"]) == ("data=2 tensor=2 pipe=2", 8)
    assert numbers["bubble_fraction"] == pytest.approx(1 / 5)
    assert numbers["device_bytes"] == sum(row["device_bytes"] for row in numbers["parameters"])


def test_train_in_a_process_of_its_own_prints_its_summary(tmp_path: Path) -> None:
    words = [
        "train",
        "quickstart",
        "--train.steps",
        "2",
        "--run.folder",
        str(tmp_path),
        "--train.eval_batches=1",
        "--optimizer.warmup_steps=1",
        "--json",
    ]
    command = [sys.executable, "-m", "trellax.commands.cli", *words]
    # By PYTHONPATH, so that it runs from a checkout too.
    path = str(Path(__file__).parents[2] / ".src")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["steps"], summary["schedule"]) == (2, "1f1b")
    first = json.loads((tmp_path / "quickstart" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(256), abs=0.05)
    assert "step 2/2" in done.stderr


def test_run_folder_that_cannot_be_made_is_refused(
    golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", "quickstart", "--run.folder", str(tmp_path / "file")]) == 2
    golden("errors/commands/cli_run_folder.txt", capsys.readouterr().err.splitlines()[0].replace(str(tmp_path), "RUN"))


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("trellax ")


def test_reader_of_a_pipe_that_has_ended_ends_a_command_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["schedule", "1f1b", "--ranks", "2", "--microbatches", "4", "--json"]) == 141
    assert capsys.readouterr().err == ""
