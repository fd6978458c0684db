"""A run can begin with the weights of a Hugging Face folder or of another run, on any mesh; wrong ones are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.configs import RunConfig, config_from_dict
from trellax.hub import run_params
from trellax.hub.config import read_hub_model
from trellax.hub.model_folder import load_params
from trellax.hub.read import read_weights
from trellax.layers import ModelConfig
from trellax.meshes import MeshSpec, TrellaxError, build_mesh
from trellax.pipeline import natural_order
from trellax.serve import param_shapes
from trellax.train import Checkpoints, Setup, train
from trellax.train.checkpoints import initial_weights as run_weights
from trellax.train.checkpoints.initial_weights import (
    check_initial_weights,
    initial_state,
    save_params,
    weight_shapes,
)

from ...hub.hub import GOLDEN, shapes_of


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A corpus of small token ids, as no tokenizer of 64 ids is at hand."""
    file = tmp_path / "tokens.npy"
    np.save(file, (np.arange(4000) ** 2 % 61).astype(np.uint16))
    return file


def run_of(model: ModelConfig, text: Path, *, mesh: str = "data=1", **sections: dict[str, Any]) -> RunConfig:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "folder": str(text.parent / "runs")},
        "mesh": MeshSpec.parse(mesh).sizes,
        "model": {**vars(model), "dtype": "float32"},
        "data": {"source": "tokens", "paths": [str(text)], "seq_len": 16},
        "train": {"steps": 2, "batch_size": 4, "eval_batches": 1},
        "optimizer": {"learning_rate": 1e-3},
        "pipeline": {"microbatches": 2},
    }
    for name, keys in sections.items():
        values.setdefault(name, {}).update(keys)
    return config_from_dict(values)


def setup_of(config: RunConfig) -> Setup:
    return Setup(config, build_mesh(config.mesh, devices=jax.devices()[: config.mesh.num_devices]))


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def are_equal(one: Any, other: Any) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(leaves(one), leaves(other), strict=True))


@pytest.mark.parametrize(("name", "mesh"), [("llama3", "data=2,tensor=2,pipe=2"), ("gpt2", "data=2")])
def test_run_starts_with_the_weights_of_a_hugging_face_folder(name: str, mesh: str, text: Path) -> None:
    source = GOLDEN / name
    config = run_of(read_hub_model(source).config, text, mesh=mesh, train={"init_from": str(source)})
    setup = setup_of(config)
    check_initial_weights(setup)
    state = initial_state(setup)
    expected = read_weights(source, shapes_of(source))
    assert are_equal(natural_order(state.params.stages), expected["blocks"])
    assert are_equal(state.params.shared["embed"], expected["embed"])
    assert int(state.step) == 0
    assert all(not leaf.any() for leaf in leaves(state.opt_state))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings


def test_saved_weights_alone_are_a_run_before_its_first_step(text: Path) -> None:
    source = GOLDEN / "llama3"
    config = run_of(read_hub_model(source).config, text, mesh="tensor=2,pipe=2")
    folder = Path(config.run_folder)
    params = read_weights(source, shapes_of(source))
    save_params(folder, params, config)
    setup = setup_of(config)
    with Checkpoints(folder, keep=2) as checkpoints:
        state = checkpoints.restore(setup)
    assert are_equal(natural_order(state.params.stages), params["blocks"])
    assert all(not leaf.any() for leaf in leaves(state.opt_state))
    assert are_equal(load_params(folder, weight_shapes(setup_of(run_of(config.model, text)))), params)


def test_saved_weights_are_read_in_the_type_that_a_model_computes_in(text: Path) -> None:
    config = run_of(read_hub_model(GOLDEN / "llama3").config, text)
    params = read_weights(GOLDEN / "llama3", shapes_of(GOLDEN / "llama3"))
    save_params(config.run_folder, params, config)
    mesh = build_mesh(MeshSpec(tensor=2, pipe=2), devices=jax.devices()[:4])
    shapes = param_shapes(config.model, mesh=mesh, dtype="bfloat16")
    found = load_params(config.run_folder, shapes)
    assert are_equal(found, read_weights(GOLDEN / "llama3", shapes))
    placed = [(leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(found)]
    assert placed == [(leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(shapes)]


@pytest.mark.slow
def test_run_starts_with_the_weights_of_a_run_and_resumes_its_own(text: Path) -> None:
    source, still = GOLDEN / "llama3", {"learning_rate": 1e-30, "weight_decay": 0.0}
    model, sizes = read_hub_model(source).config, {"batch_size": 16}

    def config(name: str, **changes: Any) -> RunConfig:
        return run_of(model, text, mesh="data=8", run={"name": name}, optimizer=still, train=sizes | changes)

    first, second = config("first", init_from=str(source)), config("second", init_from=f"{text.parent}/runs/first")
    train(first)
    train(second)
    params = load_params(second.run_folder, weight_shapes(setup_of(run_of(model, text))))
    assert are_equal(params, read_weights(source, shapes_of(source)))
    # A run that goes on does not ask for what it started from.
    shutil.rmtree(first.run_folder)
    assert train(config("second", init_from=f"{text.parent}/runs/first", steps=3)).steps == 3


def test_initial_weights_are_not_needed_once_a_run_has_a_save(text: Path) -> None:
    config = run_of(read_hub_model(GOLDEN / "llama3").config, text, train={"init_from": "nowhere"})
    setup = setup_of(config)
    with pytest.raises(TrellaxError):
        check_initial_weights(setup)
    save_params(config.run_folder, read_weights(GOLDEN / "llama3", weight_shapes(setup)), config)
    check_initial_weights(setup)


def test_wrong_weights_are_refused_before_the_old_run_is_moved_aside(text: Path) -> None:
    sizes = {"init_from": "nowhere", "batch_size": 16}
    config = run_of(read_hub_model(GOLDEN / "llama3").config, text, mesh="data=8", train=sizes)
    save_params(config.run_folder, read_weights(GOLDEN / "llama3", weight_shapes(setup_of(config))), config)
    with pytest.raises(TrellaxError, match="nowhere"):
        train(config, start="replace")
    assert (config.run_folder / "checkpoints" / "0").is_dir()


def test_reader_is_reported_of_a_damaged_save(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_of(read_hub_model(GOLDEN / "llama3").config, text)
    params = read_weights(GOLDEN / "llama3", weight_shapes(setup_of(config)))
    save_params(config.run_folder, params, config)
    (config.run_folder / "checkpoints" / "7").mkdir()
    assert are_equal(load_params(config.run_folder, weight_shapes(setup_of(config))), params)
    assert capsys.readouterr().err == "checkpoint 7 is damaged: seal.json is missing. The one before is used.\n"


MISTAKES: dict[str, tuple[str, dict[str, Any]]] = {
    "other_sizes": ("llama3", {"num_layers": 4, "num_kv_heads": 4, "rope_theta": 10_000.0}),
    "other_architecture": ("gpt2", {"positions": "rotary"}),
    "no_folder": ("nowhere", {}),
    "damaged": ("damaged", {}),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_weights_of_another_model_are_refused_before_anything_is_made(
    name: str, text: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(text.parent)
    folder, changes = MISTAKES[name]
    origin = GOLDEN / (folder if (GOLDEN / folder).is_dir() else "llama3")
    if folder != "nowhere":
        shutil.copytree(origin, folder)
    if folder == "damaged":
        sorted(Path(folder).glob("*.safetensors"))[0].unlink()
    model = ModelConfig(**(vars(read_hub_model(origin).config) | changes))
    config = run_of(model, text, train={"init_from": folder})
    with pytest.raises(TrellaxError) as caught:
        check_initial_weights(setup_of(config))
    golden(f"errors/train/init_from_{name}.txt", str(caught.value))


def test_shapes_are_those_of_the_model_in_natural_order(text: Path) -> None:
    config = run_of(read_hub_model(GOLDEN / "llama3").config, text, mesh="tensor=2,pipe=2")
    up = weight_shapes(setup_of(config))["blocks"]["mlp"]["up"]["kernel"]
    assert up.shape == (2, 16, 32)
    assert up.sharding.spec == jax.P("pipe", None, "tensor")


def test_first_process_says_whether_a_run_begins(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of two processes with two run folders one would read the weights alone, and find their saves "damaged".
    asked: list[str] = []
    config = run_of(read_hub_model(GOLDEN / "gpt2").config, text, train={"init_from": str(text.parent / "nothing")})
    setup = setup_of(config)

    def answer_of_first(own: str) -> str:
        asked.append(own)
        return ""

    monkeypatch.setattr(run_weights, "text_of_first", answer_of_first)
    check_initial_weights(setup)
    assert asked == ["empty"]
    monkeypatch.setattr(run_params, "is_first", lambda: False)
    run_params.say_on_stderr("told by the first process alone")
    assert capsys.readouterr().err == ""
