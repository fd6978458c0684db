"""`trellax train` over context takes the steps of a mesh without it, also with several documents in a sequence."""

import shutil
from pathlib import Path

import jax
import pytest
from trellax.commands.cli import main
from trellax.meshes import MeshSpec, build_mesh
from trellax.train import evaluate
from trellax.train.metrics import read_metrics, read_summary

SIZES = (
    "--model.num_layers 4 --data.source text --data.paths texts/*.txt --data.seq_len 32 --train.steps 3 "
    "--train.batch_size 16 --train.log_every 1 --optimizer.warmup_steps 1 --pipeline.microbatches 2 "
    "--data.packing on"
)
MESHES = {
    "data": "--mesh.data 8",
    "context": "--mesh.context 4 --mesh.pipe 2 --pipeline.context_attention gather",
    "exchange": "--mesh.context 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.schedule zb-h1 --train.shard layer "
    "--pipeline.context_attention ulysses",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each mesh, on texts of 5 to 45 bytes."""
    folder = tmp_path_factory.mktemp("context")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("texts").mkdir()
        for number in range(150):
            Path(f"texts/{number:03}.txt").write_bytes(bytes(97 + i * number % 25 for i in range(5 + number % 40)))
        for name, words in MESHES.items():
            assert main(["train", "tiny-dense", *SIZES.split(), *words.split(), "--run.name", name]) == 0
    return folder


@pytest.mark.parametrize("name", ["context", "exchange"])
def test_losses_and_norms_are_those_of_data_alone(name: str, runs: Path) -> None:
    own, expected = (read_metrics(runs / "runs" / run) for run in (name, "data"))
    for key in ("loss", "grad_norm", "val_loss"):
        found = [[line[key] for line in lines if key in line] for lines in (own, expected)]
        assert len(found[1]) == (1 if key == "val_loss" else 3)
        assert found[0] == pytest.approx(found[1], rel=2e-5)


def test_a_run_goes_on_and_is_evaluated_on_another_mesh(runs: Path) -> None:
    summary = read_summary(runs / "runs" / "context")
    val_loss = summary and summary.final_val_loss
    spec = MeshSpec.parse("context=2,data=2")
    mesh = build_mesh(spec, devices=jax.devices()[:4])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(runs)
        assert evaluate("runs/context") == val_loss
        assert evaluate("runs/context", mesh=mesh, axes=spec.roles) == pytest.approx(val_loss, rel=2e-5)
        shutil.copytree("runs/context", "runs/again")
        words = f"{SIZES} --train.steps 4 --override --run.name again --mesh.data 2 --mesh.context 2 --mesh.tensor 2"
        assert main(["train", "tiny-dense", *words.split()]) == 0
    assert [line["step"] for line in read_metrics(runs / "runs" / "again") if "loss" in line] == [1, 2, 3, 4]
