"""A save holds no padding of the vocabulary, and is read on a mesh that pads it otherwise, bit for bit."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.configs import RunConfig
from trellax.hub.load import load_model
from trellax.hub.model_folder import load_params
from trellax.hub.run_params import run_saves
from trellax.hub.saves.reader import SaveReader
from trellax.layers import ModelConfig
from trellax.train import Checkpoints, TrainState, train
from trellax.train.checkpoints.initial_weights import weight_shapes
from trellax.train.metrics import read_metrics

from .test_initial_weights import run_of, setup_of, text

__all__ = ["text"]

WORDS = 65
MODEL = ModelConfig(vocab_size=WORDS, num_layers=2, hidden_size=24, num_heads=24, max_tokens=16, embeddings="untied")


def tables_of(state: TrainState) -> dict[str, np.ndarray]:
    """Every table of a state, of parameters and of moments."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves if "table" in str(path)}


def padded_run(text: Path, *, mesh: str, **sections: Any) -> RunConfig:
    constant = {"learning_rate": 1e-2, "min_lr_ratio": 1.0}
    return run_of(MODEL, text, mesh=mesh, **{"train": {"batch_size": 8}, "optimizer": constant} | sections)


@pytest.mark.parametrize("offload", ["none", pytest.param("optimizer", marks=pytest.mark.slow)])
def test_save_of_a_padded_vocabulary_is_read_on_any_mesh(offload: str, text: Path) -> None:
    wide = setup_of(padded_run(text, mesh="tensor=4,pipe=2"))
    state = wide.init_state()
    narrow = setup_of(padded_run(text, mesh="tensor=3", train={"batch_size": 8, "offload": offload}))
    folder = wide.config.run_folder
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(state, wide)
        checkpoints.wait()
        there = checkpoints.restore(narrow)
    before, after = tables_of(state), tables_of(there)
    assert {table.shape[0] for table in before.values()} == {128}
    assert {table.shape[0] for table in after.values()} == {72}
    assert before.keys() == after.keys()
    for name, table in before.items():
        assert np.array_equal(table[:WORDS], after[name][:WORDS])
        assert not table[WORDS:].any()
        assert not after[name][WORDS:].any()
    assert there.params.shared["embed"]["table"].sharding == narrow.model.shardings.shared["embed"]["table"]
    seal = SaveReader(folder=run_saves(folder)).require_newest()
    assert {shape[0] for path, (_, shape, _) in seal.arrays.items() if "table" in path} == {WORDS}


@pytest.mark.slow
def test_first_values_of_words_do_not_depend_on_the_padding(text: Path) -> None:
    padded, whole = (setup_of(padded_run(text, mesh=mesh)).init_state() for mesh in ("tensor=8", "data=1"))
    for name, table in tables_of(whole).items():
        assert np.array_equal(tables_of(padded)[name][:WORDS], table)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"shard": "layer", "ema": 0.5}, {"shard": "optimizer", "offload": "optimizer"}])
def test_run_goes_on_with_another_padding_as_without_any(more: dict[str, Any], text: Path) -> None:
    own = {"batch_size": 16, "steps": 4, **more}
    one = padded_run(text, mesh="data=8", run={"name": "one"}, train=own)
    cut = padded_run(text, mesh="data=2,tensor=2,pipe=2", run={"name": "cut"}, train=own | {"steps": 2})
    went_on = padded_run(text, mesh="tensor=4,pipe=2", run={"name": "cut"}, train=own)
    train(one)
    train(cut)
    train(went_on, changes="accept")
    losses = [read_metrics(config.run_folder)[-1]["val_loss"] for config in (one, went_on)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)


@pytest.mark.slow
def test_model_of_a_folder_is_called_with_a_padded_vocabulary(text: Path) -> None:
    setup = setup_of(padded_run(text, mesh="tensor=4,pipe=2"))
    folder, tokens = setup.config.run_folder, jnp.arange(12)[None] % WORDS
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(setup.init_state(), setup)
    expected = load_model(folder)(tokens)
    params = load_params(folder, weight_shapes(setup))
    assert params["head"]["table"].shape == (WORDS, 24)
    mesh = setup_of(padded_run(text, mesh="data=2,tensor=4")).mesh
    model = load_model(folder, mesh=mesh)
    assert model.embed.table.shape == (96, 24)
    call = nnx.jit(lambda model, tokens: model(tokens))
    with jax.set_mesh(mesh):
        found = call(model, jnp.repeat(tokens, 2, axis=0))
    np.testing.assert_allclose(found, np.repeat(expected, 2, axis=0), atol=2e-5)
