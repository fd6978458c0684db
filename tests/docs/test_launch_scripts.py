"""What starts runs elsewhere is right: with a `srun` and a `trellax` that only write down what they are told."""

import contextlib
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from trellax.commands import cli
from trellax.configs import RunConfig

from .pages import DOCS, ROOT


def stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def understood(words: list[str], monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Run the command line with its words up to where training would start; return the config."""
    seen: list[RunConfig] = []

    class EndError(Exception):
        pass

    def end(config: RunConfig, **_: object) -> None:
        seen.append(config)
        raise EndError

    monkeypatch.setattr("trellax.commands.train.train", end)
    monkeypatch.setattr("trellax.commands.processes.join_run", lambda *_, **__: contextlib.nullcontext())
    with pytest.raises(EndError):
        cli.main(words)
    return seen[0]


@pytest.mark.parametrize(
    ("code", "ended", "requeued"),
    [(0, "done", False), (0, "SIGTERM", True), (75, "", True), (137, "", True), (1, "", False), (2, "", False)],
)
def test_slurm_script_trains_and_requeues_itself(
    code: int, ended: str, requeued: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(tmp_path, "srun", 'exec "$@"')
    stub(tmp_path, "scontrol", 'echo "$@" > requeued')
    stub(tmp_path, "trellax", f'printf "%s\\n" "$@" > words; echo \'{{"ended": "{ended}"}}\'; exit {code}')
    done = subprocess.run(
        ["bash", DOCS / "how-to" / "slurm.sh", "llama3-8b-8gpu", "--mesh.pipe", "4"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
        check=False,
    )
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == requeued
    config = understood((tmp_path / "words").read_text().splitlines(), monkeypatch)
    assert (config.mesh.pipe, config.run.folder) == (4, str(tmp_path / "runs"))


def test_kubernetes_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "how-to" / "kubernetes.yaml").read_text()
    command = re.search(r"exec (trellax train .*?)\n +resources:", text, flags=re.DOTALL)
    assert command
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    config = understood(shlex.split(os.path.expandvars(command[1]))[1:], monkeypatch)
    pods = int(re.findall(r"completions: (\d+)", text)[0])
    gpus = int(re.findall(r"nvidia.com/gpu: (\d+)", text)[0])
    assert config.mesh.num_devices == pods * gpus
    assert f"--num-processes {pods}" in command[1]


def test_skypilot_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "how-to" / "skypilot.yaml").read_text()
    (command,) = re.findall(r"exec (trellax train .*)", text)
    nodes, gpus = (int(re.findall(pattern, text)[0]) for pattern in (r"num_nodes: (\d+)", r"accelerators: \w+:(\d+)"))
    printed = subprocess.run(
        ["bash", "-c", f'printf "%s\\n" {command}'],
        env={"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": f"{nodes}", "SKYPILOT_NODE_RANK": "1"}
        | {"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    words = printed.stdout.splitlines()[1:]
    assert understood(words, monkeypatch).mesh.num_devices == nodes * gpus
    assert words[words.index("--coordinator") + 1] == "10.0.0.1:61440"
    assert words[words.index("--num-processes") + 1] == f"{nodes}"


def test_dockerfile_copies_and_installs_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "how-to" / "Dockerfile").read_text()
    for name in re.findall(r"^COPY ([\w.]+) \.", text, flags=re.MULTILINE):
        assert (ROOT / name).exists()
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", text)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)
    (command,) = re.findall(r"docker run .* (trellax train .*)", text)
    assert understood(shlex.split(command)[1:], monkeypatch).run.folder == "/runs"
    # What is never needed in an image, and may be large.
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs"} <= set(ignored)
