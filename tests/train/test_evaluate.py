"""A run folder, restored by public names alone, has the validation loss that its run logged, on any mesh."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from trellax.configs import RunConfig, load_config, load_saved_config
from trellax.hub import load_params
from trellax.meshes import CheckpointError, DataError, MeshSpec, build_mesh
from trellax.train import (
    Checkpoints,
    Setup,
    evaluate,
    evaluate_state,
    initial_state,
    prepare,
    train,
    weight_shapes,
)
from trellax.train.metrics import read_metrics

Tiny = Callable[..., RunConfig]
MESH = "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 2"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of four steps, done, which validated after the second and the last."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    own = ["--run.folder", str(folder / "runs"), "--data.source", "text", "--data.paths", str(folder / "corpus.txt")]
    words = f"{MESH} --train.steps 4 --train.eval_every 2 --train.eval_batches 3"
    config = load_config("tiny-llama", [*own, *words.split()])
    train(config, console=Console(file=io.StringIO()))
    return config


def logged(config: RunConfig) -> dict[int, float]:
    return {line["step"]: line["val_loss"] for line in read_metrics(config.run_folder) if "val_loss" in line}


def test_loss_of_a_run_folder_is_the_one_its_run_logged(config: RunConfig) -> None:
    before = sorted(config.run_folder.rglob("*"))
    assert evaluate(config.run_folder) == logged(config)[4]
    assert sorted(config.run_folder.rglob("*")) == before
    # Sums over other devices are rounded in another order: float32 has 7 digits.
    for sizes in ("data=1", "tensor=2,pipe=2"):
        spec = MeshSpec.parse(sizes)
        mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
        assert evaluate(config.run_folder, mesh=mesh) == pytest.approx(logged(config)[4], rel=1e-5)


def test_loss_on_a_corpus_that_has_changed_is_refused(config: RunConfig) -> None:
    corpus = Path(config.data.paths[0])
    before = corpus.read_bytes()
    corpus.write_bytes(before + b"more")
    try:
        with pytest.raises(DataError, match=r"was trained on the corpus with sha256 [0-9a-f]{12}, and its files now"):
            evaluate(config.run_folder)
    finally:
        corpus.write_bytes(before)


def test_state_is_restored_and_evaluated_by_public_names(config: RunConfig) -> None:
    setup = prepare(load_saved_config(config.run_folder))
    with Checkpoints(config.run_folder) as checkpoints:
        state = checkpoints.restore(setup)
    assert evaluate_state(setup, state) == logged(config)[4]
    # Parameters alone, in the order of the model: blocks [L, ...].
    params = load_params(config.run_folder, weight_shapes(setup))
    assert params["blocks"].keys() == weight_shapes(setup)["blocks"].keys()
    assert np.array_equal(params["embed"]["table"], state.params.shared["embed"]["table"])


def test_fresh_state_has_the_loss_of_a_uniform_guess(tiny: Tiny) -> None:
    setup = prepare(tiny(MESH))
    assert isinstance(setup, Setup)
    # Every byte is as likely as any other, but for the noise of the initial parameters.
    assert evaluate_state(setup, initial_state(setup)) == pytest.approx(np.log(256), abs=0.3)


READ_FIRST = """
from trellax.configs import load_saved_config
from trellax.meshes import use_fake_devices
config = load_saved_config({folder!r})
use_fake_devices(3)
"""


def test_reading_a_save_starts_no_backend_so_fake_devices_can_follow(config: RunConfig) -> None:
    # `evaluate("runs/quickstart")` learns the number of fake devices from the save.
    code = READ_FIRST.format(folder=str(config.run_folder))
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr


def test_folder_without_a_save_is_refused(tiny: Tiny) -> None:
    config = tiny(MESH)
    with pytest.raises(CheckpointError):
        evaluate(config.run_folder)
