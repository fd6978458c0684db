"""A run with adapters trains and saves those alone, on any mesh, and is read as the model that they are merged into."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.configs import RunConfig
from trellax.hub import load_model
from trellax.hub.config import read_hub_model
from trellax.hub.run_params import run_saves
from trellax.hub.saves.reader import SaveReader
from trellax.layers import Transformer, param_counts
from trellax.meshes import ConfigError
from trellax.pipeline import natural_order
from trellax.train import Checkpoints, evaluate, train
from trellax.train.checkpoints.initial_weights import check_initial_weights, initial_state
from trellax.train.metrics import read_metrics

from ..hub.hub import GOLDEN
from .checkpoints.test_initial_weights import are_equal, run_of, setup_of, text

__all__ = ["text"]

SOURCE = GOLDEN / "llama3"
LORA: dict[str, Any] = {"lora_rank": 2, "lora_alpha": 4.0}


def lora_run(
    text: Path, *, name: str = "run", mesh: str = "data=8", steps: int = 2, magnitude: str = "off", **train: Any
) -> RunConfig:
    sections = {"train": {"init_from": str(SOURCE), "steps": steps, "batch_size": 16} | train}
    sections |= {"run": {"name": name}, "optimizer": {"learning_rate": 0.05, "min_lr_ratio": 1.0}}
    own: dict[str, Any] = LORA | {"lora_magnitude": magnitude}
    model = replace(read_hub_model(SOURCE).config, **own)
    return run_of(model, text, mesh=mesh, **sections)


def test_optimizer_state_and_saves_are_those_of_adapters(text: Path) -> None:
    config = lora_run(text)
    setup = setup_of(config)
    check_initial_weights(setup)
    state, counts = initial_state(setup), param_counts(config.model)
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == counts.total
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.nbytes for leaf in moments) == 2 * 4 * counts.adapters
    train(config)
    seal = SaveReader(folder=run_saves(config.run_folder)).require_newest()
    saved = {path: np.prod(shape) for path, (_, shape, _) in seal.arrays.items() if path.startswith("params.")}
    assert sum(saved.values()) == counts.trained == counts.adapters
    assert all(path.endswith(("lora_a", "lora_b")) for path in saved)


@pytest.mark.parametrize("more", [{}, {"shard": "layer"}], ids=["whole", "layers gathered"])
def test_run_resumes_on_another_mesh_with_the_same_losses(more: dict[str, Any], text: Path) -> None:
    one, cut = lora_run(text, name="one", steps=4), lora_run(text, name="cut", steps=2)
    train(one)
    train(cut)
    went_on = lora_run(text, name="cut", mesh="data=2,tensor=2,pipe=2", steps=4, **more)
    train(went_on, changes="accept")
    losses = [read_metrics(config.run_folder)[-1]["val_loss"] for config in (one, went_on)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize("magnitude", ["off", "on"])
def test_model_of_the_run_has_its_adapters_merged(magnitude: str, text: Path) -> None:
    config = lora_run(text, magnitude=magnitude)
    train(config)
    with Checkpoints(config.run_folder) as checkpoints:
        state = checkpoints.restore(setup := setup_of(config))
    fresh = initial_state(setup)
    assert are_equal(state.params.shared, fresh.params.shared)
    own, merged = load_model(SOURCE), load_model(config.run_folder)
    assert merged.config == own.config
    tokens = jnp.arange(12)[None] % 61
    assert jnp.abs(merged(tokens) - own(tokens)).max() > 1e-2
    unmerged = _unmerged(config, state)
    np.testing.assert_allclose(merged(tokens), unmerged(tokens), atol=2e-5)


def _unmerged(config: RunConfig, state: Any) -> Any:
    """Return the model whose adapters are products of their own."""
    model = nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0)))
    nnx.update(model, {"blocks": natural_order(state.params.stages), **state.params.shared})
    return model


def test_fresh_magnitudes_are_the_lengths_of_the_columns_that_are_read(text: Path) -> None:
    state = initial_state(setup_of(lora_run(text, magnitude="on")))
    layer = state.params.stages["mlp"]["down"]
    np.testing.assert_allclose(layer["lora_m"], np.linalg.norm(layer["kernel"], axis=-2), rtol=1e-5)


def test_adapters_without_weights_are_refused(text: Path) -> None:
    config = lora_run(text, init_from="")
    with pytest.raises(ConfigError, match=r"train\.init_from does not say which"):
        check_initial_weights(setup_of(config))


def test_frozen_weights_are_kept_in_the_compute_dtype(text: Path) -> None:
    config = lora_run(text)
    config = config.model_copy(update={"model": replace(config.model, dtype="bfloat16")})
    state = initial_state(setup_of(config))
    kernel = state.params.stages["mlp"]["up"]
    assert {name: leaf.dtype.name for name, leaf in kernel.items()} == {
        "kernel": "bfloat16",
        "lora_a": "float32",
        "lora_b": "float32",
    }


@pytest.mark.slow
def test_average_is_that_of_the_adapters_and_is_merged_as_they_are(text: Path) -> None:
    config = lora_run(text, steps=4, ema=0.9)
    state = initial_state(setup_of(config))
    counts = param_counts(config.model)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state[-1])) == 4 * counts.adapters
    train(config)
    tokens = jnp.arange(12)[None] % 61
    own, last = load_model(SOURCE)(tokens), load_model(config.run_folder)(tokens)
    average = load_model(config.run_folder, weights="ema")(tokens)
    # It remembers the first adapters, with which the model is that of its source.
    assert 0 < jnp.abs(average - own).max() < jnp.abs(last - own).max()


def _train_both(one: RunConfig, cut: RunConfig, went_on: RunConfig) -> float:
    """Train a run at once, and one in two parts; return the loss that both end with."""
    check_initial_weights(setup_of(one))
    train(one)
    train(cut)
    train(went_on, changes="accept")
    losses = [read_metrics(config.run_folder)[-1]["val_loss"] for config in (one, went_on)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    return losses[0]


@pytest.mark.slow
def test_run_on_kernels_of_four_bits_goes_on_elsewhere_and_is_the_model_of_its_rounded_base(text: Path) -> None:
    def run(name: str, mesh: str, steps: int, **train: Any) -> RunConfig:
        config = lora_run(text, name=name, mesh=mesh, steps=steps, **train)
        return config.model_copy(update={"model": replace(config.model, lora_base="nf4")})

    one, cut = run("one", "data=8", 4), run("cut", "data=8", 2)
    went_on = run("cut", "data=2,tensor=2,pipe=2", 4, shard="layer")
    loss = _train_both(one, cut, went_on)
    with Checkpoints(one.run_folder) as checkpoints:
        state = checkpoints.restore(setup_of(one))
    seal = SaveReader(folder=run_saves(one.run_folder)).require_newest()
    assert all(path.endswith(("lora_a", "lora_b")) for path in seal.arrays if path.startswith("params."))
    merged, tokens = load_model(one.run_folder), jnp.arange(12)[None] % 61
    assert (merged.config.lora_rank, merged.config.lora_base) == (0, "plain")
    np.testing.assert_allclose(merged(tokens), _unmerged(one, state)(tokens), atol=2e-5)
    assert abs(evaluate(one.run_folder, mesh=setup_of(went_on).mesh) - loss) < 2e-5 * loss


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_magnitude": "on"}, {"lora_base": "nf4"}], ids=str)
def test_run_with_adapters_of_every_kind_goes_on_elsewhere_and_is_merged(more: dict[str, Any], text: Path) -> None:
    """Attention from latent vectors, dense layers, experts, shared experts and the head, on meshes with expert."""
    source = GOLDEN / "deepseek_v3"
    own: dict[str, Any] = LORA | {"lora_targets": ("*", "head")} | more

    def run(name: str, mesh: str, steps: int, **train: Any) -> RunConfig:
        sections = {"train": {"init_from": str(source), "steps": steps, "batch_size": 16} | train}
        sections |= {"run": {"name": name}, "optimizer": {"learning_rate": 0.05, "min_lr_ratio": 1.0}}
        return run_of(replace(read_hub_model(source).config, **own), text, mesh=mesh, **sections)

    one, cut = run("one", "data=8", 4), run("cut", "data=2,expert=4", 2)
    went_on = run("cut", "expert=2,tensor=2,pipe=2", 4)
    _train_both(one, cut, went_on)
    with Checkpoints(went_on.run_folder) as checkpoints:
        state = checkpoints.restore(setup_of(one))
    seal = SaveReader(folder=run_saves(one.run_folder)).require_newest()
    saved = {path: np.prod(shape) for path, (_, shape, _) in seal.arrays.items() if path.startswith("params.")}
    assert sum(saved.values()) == param_counts(one.model).trained
    assert any(".head.lora_b" in path for path in saved)
    merged, tokens = load_model(went_on.run_folder), jnp.arange(12)[None] % 61
    assert merged.config.lora_rank == 0
    np.testing.assert_allclose(merged(tokens), _unmerged(one, state)(tokens), atol=5e-5)
