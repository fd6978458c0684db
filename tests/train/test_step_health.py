"""A bad step leaves the state unchanged, bit by bit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from trellax.configs import RunConfig
from trellax.meshes import MeshSpec, build_mesh
from trellax.train import Batches, Setup, load_corpus, make_train_step

Tiny = Callable[..., RunConfig]


@pytest.fixture
def batches(tiny: Tiny) -> Callable[[RunConfig], Callable[[int], dict[str, np.ndarray]]]:
    def make(config: RunConfig) -> Callable[[int], dict[str, np.ndarray]]:
        tokens = load_corpus(config.data).train
        return Batches(tokens, seq_len=config.data.seq_len, batch_size=8, microbatches=2, seed=0).__getitem__

    return make


STEPS: dict[tuple[str, str], tuple[Setup, Any]] = {}
"""The setups of these tests with their jitted steps: each is traced and compiled once."""


def make_step(config: RunConfig, *, mesh: str) -> tuple[Setup, Any]:
    key = (config.model_dump_json(exclude={"run": True, "data": {"paths"}}), mesh)
    if key not in STEPS:
        spec = MeshSpec.parse(mesh)
        setup = Setup(config, build_mesh(spec, devices=jax.devices()[: spec.num_devices]))
        STEPS[key] = setup, make_train_step(setup)
    return STEPS[key]


def run(config: RunConfig, given: list[dict[str, Any]], *, mesh: str = "data=1") -> tuple[Any, list[Any]]:
    setup, step = make_step(config, mesh=mesh)
    state, metrics = setup.init_state(), []
    for batch in given:
        state, out = step(state, jax.device_put(batch, setup.batch_sharding))
        metrics.append(jax.device_get(out))
    return jax.device_get(state), metrics


def spoil(batch: dict[str, np.ndarray], weight: float) -> dict[str, np.ndarray]:
    weights = batch["weights"].copy()
    weights[1, 2, 3] = weight
    return batch | {"weights": weights}


def same(ours: Any, theirs: Any) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(ours), jax.tree.leaves(theirs)))


@pytest.mark.parametrize(
    ("weight", "mesh"),
    [(float("nan"), "data=2,pipe=2"), pytest.param(float("inf"), "data=1", marks=pytest.mark.slow)],
)
def test_skipped_batch_leaves_no_trace_in_the_weights(tiny: Tiny, batches: Any, weight: float, mesh: str) -> None:
    config = tiny("--pipeline.microbatches 2 --train.bad_step skip --train.shard optimizer")
    batch = batches(config)
    expected, good = run(config, [batch(0), batch(1)], mesh=mesh)
    state, metrics = run(config, [batch(0), spoil(batch(2), weight), batch(1)], mesh=mesh)
    assert same((state.params, state.opt_state), (expected.params, expected.opt_state))
    assert [bool(out.taken) for out in metrics] == [True, False, True]
    assert (int(state.step), int(state.health.skipped)) == (3, 1)
    # The schedule counts updates, not batches.
    assert metrics[2].lr == good[1].lr


def test_step_in_progress_after_a_bad_one_changes_nothing(tiny: Tiny, batches: Any) -> None:
    config = tiny("--pipeline.microbatches 2")
    batch = batches(config)
    expected, _ = run(config, [batch(0)])
    state, metrics = run(config, [batch(0), spoil(batch(1), float("nan")), batch(2)])
    assert same((state.step, state.params, state.opt_state), (expected.step, expected.params, expected.opt_state))
    assert [bool(out.taken) for out in metrics] == [True, False, False]
    assert bool(state.health.halted)


def test_spike_is_a_loss_far_above_the_mean_of_the_good_ones(tiny: Tiny, batches: Any) -> None:
    config = tiny("--pipeline.microbatches 2 --train.bad_step skip --train.spike_ratio 1.5")
    batch = batches(config)
    # A weight of 1 on one token, over the rest of the batch, nearly doubles the loss.
    state, metrics = run(config, [batch(0), spoil(batch(1), 1.0), batch(1)])
    assert [bool(out.taken) for out in metrics] == [True, False, True]
    assert metrics[1].loss > 1.5 * metrics[0].loss
    assert metrics[1].mean_loss == metrics[0].loss
    expected, good = run(config, [batch(0), batch(1)])
    assert [bool(out.taken) for out in good] == [True, True]
    assert same(state.params, expected.params)


def test_mean_of_the_loss_starts_at_the_first_one(tiny: Tiny, batches: Any) -> None:
    config = tiny("--pipeline.microbatches 2")
    state, metrics = run(config, [batches(config)(0)])
    assert state.health == replace(state.health, mean_loss=metrics[0].loss)
