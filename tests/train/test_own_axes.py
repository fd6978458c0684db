"""`trellax train` with own names of axes takes the steps of the default names, to the digit."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.meshes import MeshError, MeshSpec, build_mesh
from trellax.train import Setup, evaluate
from trellax.train.metrics import read_metrics, read_summary

HEAD = {
    "default": "[mesh]\ndata = 2\ntensor = 2\npipe = 2\n",
    "own": '[mesh]\ndp = 2\ntp = 2\npp = 2\n[mesh.roles]\ndp = "batch"\ntp = "tensor"\npp = "pipe"\n',
}
REST = """
[model]
vocab_size = 256
num_layers = 4
hidden_size = 32
num_heads = 4
num_kv_heads = 2
[data]
source = "text"
paths = ["corpus.txt"]
seq_len = 16
[train]
steps = 3
batch_size = 8
log_every = 1
shard = "optimizer"
[optimizer]
learning_rate = 1e-3
[pipeline]
microbatches = 4
schedule = "zb-h1"
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of each head."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
        for name, head in HEAD.items():
            Path(f"{name}.toml").write_text(head + REST)
            assert main(["train", f"{name}.toml"]) == 0
    return folder


def numbers(folder: Path) -> list[tuple[float, ...]]:
    keys = ("loss", "grad_norm", "lr", "val_loss")
    return [tuple(line[key] for key in keys if key in line) for line in read_metrics(folder)]


def test_losses_are_those_of_the_default_names_to_the_digit(runs: Path) -> None:
    own = numbers(runs / "runs/own")
    assert len(own) == 4
    assert own == numbers(runs / "runs/default")


def test_run_is_evaluated_on_any_mesh(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    (val_loss,) = numbers(runs / "runs/own")[-1]
    assert evaluate("runs/own") == val_loss
    others = {"data=2": False, "replica=2:batch,tensor=2": True}
    for text, has_own_names in others.items():
        spec = MeshSpec.parse(text)
        mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
        loss = evaluate("runs/own", mesh=mesh, axes=spec.roles if has_own_names else None)
        assert loss == pytest.approx(val_loss, rel=1e-5)


def test_save_is_restored_by_a_run_with_other_names(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    shutil.copytree("runs/own", "again/own")
    # The run is at its end, so that it takes no step: it restores the state, and validates it.
    assert main(["train", "default.toml", "--run.name", "own", "--run.folder", "again"]) == 0
    before, after = (read_summary(Path(folder) / "own") for folder in ("runs", "again"))
    assert before is not None
    assert after is not None
    assert (after.steps, after.final_val_loss) == (before.steps, before.final_val_loss)


def test_report_shows_own_names(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    assert main(["describe", "own.toml"]) == 0
    out = capsys.readouterr().out
    assert "mesh      dp=2 tp=2 pp=2" in out
    assert "256@pp+tp, 32" in out


def test_inspector_counts_traffic_by_own_names(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    shown = []
    for name in HEAD:
        assert main(["inspect", f"{name}.toml", "--json"]) == 0
        shown.append(capsys.readouterr().out)
    default, own = (json.loads(text)["traffic"] for text in shown)
    names = {"data": "dp", "tensor": "tp", "pipe": "pp"}
    for row in default:
        row["axis"] = "+".join(names[axis] for axis in row["axis"].split("+"))
    assert own == default


def test_answers_are_those_of_the_default_names(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(runs)
    answers = []
    for mesh in ("data=2,tensor=2,pipe=2", "dp=2:batch,tp=2:tensor,pp=2:pipe"):
        assert main(["generate", "runs/own", "--mesh", mesh, "--prompt", "abc", "--max-new-tokens", "6"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_mesh_whose_names_have_no_role_is_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    setup = Setup(load_config("default.toml"), build_mesh(MeshSpec.parse("dp=8:batch")))
    with pytest.raises(MeshError, match="mesh axis dp=8 has no role"):
        _ = setup.model
