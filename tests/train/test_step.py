"""Optimizer steps give the same parameters on every mesh, with and without ZeRO."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from trellax.configs import RunConfig
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import natural_order
from trellax.train import Batches, Setup, TrainState, load_corpus, make_eval_step, make_train_step

Tiny = Callable[..., RunConfig]

MESHES = ["data=8", "data=2,tensor=2,pipe=2", "data=1,tensor=4,pipe=2"]
NUM_STEPS = 20
RATES = [1e-3, 2e-3]

# The largest error of any entry, over the largest entry of its array. The gradients agree to about 1e-6; an AdamW step
# divides them by their own size plus epsilon. At the default epsilon of 1e-8 an entry whose gradient is rounding noise
# moves a full learning rate in a random direction, on one device too if summed in another order; at 1e-3 the step is a
# smooth function of the gradient, and twenty of them keep the order of 1e-6. A sum that is missing is off by 0.1.
SMOOTH = "--optimizer.epsilon 1e-3"
TOLERANCE = 2e-5


def train_on(config: RunConfig, mesh: str, *, num_steps: int) -> tuple[Setup, TrainState, list[float]]:
    setup = Setup(config, build_mesh(MeshSpec.parse(mesh)))
    corpus = load_corpus(config.data)
    batches = Batches(
        corpus.train,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        microbatches=config.pipeline.microbatches,
        seed=0,
    )
    state, step, losses = setup.init_state(), make_train_step(setup), []
    for index in range(num_steps):
        batch = jax.device_put(batches[index], setup.batch_sharding)
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    return setup, state, losses


def natural(state: TrainState) -> dict[str, np.ndarray]:
    tree = {"stages": natural_order(state.params.stages), "shared": state.params.shared}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def largest_difference(ours: TrainState, theirs: TrainState) -> float:
    a, b = natural(ours), natural(theirs)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()) for name in a)


def test_twenty_steps_give_the_same_parameters_on_three_meshes(tiny: Tiny) -> None:
    config = tiny(SMOOTH)
    _, reference, losses = train_on(config, MESHES[0], num_steps=NUM_STEPS)
    assert losses[-1] < losses[0] - 0.3
    for mesh in MESHES[1:]:
        _, state, _ = train_on(config, mesh, num_steps=NUM_STEPS)
        assert largest_difference(reference, state) < TOLERANCE


@pytest.mark.slow
def test_twenty_losses_are_the_same_at_the_default_epsilon(tiny: Tiny) -> None:
    _, _, expected = train_on(tiny(), MESHES[0], num_steps=NUM_STEPS)
    _, _, losses = train_on(tiny(), MESHES[1], num_steps=NUM_STEPS)
    assert losses == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing(tiny: Tiny) -> None:
    mesh = "data=2,tensor=2,pipe=2"
    _, whole, _ = train_on(tiny(SMOOTH), mesh, num_steps=5)
    _, parts, _ = train_on(tiny(f"{SMOOTH} --pipeline.microbatches 4"), mesh, num_steps=5)
    assert largest_difference(whole, parts) < TOLERANCE


def test_zero_changes_where_the_moments_live_and_nothing_else(tiny: Tiny) -> None:
    mesh = "data=4,tensor=1,pipe=2"
    _, whole, _ = train_on(tiny(SMOOTH), mesh, num_steps=5)
    setup, split, _ = train_on(tiny(f"{SMOOTH} --optimizer.zero on"), mesh, num_steps=5)
    assert largest_difference(whole, split) < TOLERANCE

    def held(state: TrainState) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))

    assert held(split) < 0.3 * held(whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == setup.shardings


def test_validation_loss_is_the_training_loss_of_the_same_batch(tiny: Tiny) -> None:
    config = tiny("--optimizer.learning_rate 1e-9 --pipeline.microbatches 2")
    setup, state, losses = train_on(config, "data=2,tensor=2,pipe=2", num_steps=1)
    corpus = load_corpus(config.data)
    batches = Batches(corpus.train, seq_len=32, batch_size=8, microbatches=2, seed=0)
    loss = make_eval_step(setup)(state, jax.device_put(batches[0], setup.batch_sharding))
    assert float(loss) == pytest.approx(losses[0], rel=1e-5)


def test_reported_norm_is_that_of_the_whole_gradient(tiny: Tiny) -> None:
    norms = []
    for mesh in MESHES:
        config = tiny("--pipeline.microbatches 1")
        setup = Setup(config, build_mesh(MeshSpec.parse(mesh)))
        batches = Batches(load_corpus(config.data).train, seq_len=32, batch_size=8, microbatches=1, seed=0)
        _, metrics = make_train_step(setup)(setup.init_state(), jax.device_put(batches[0], setup.batch_sharding))
        norms.append(float(metrics.grad_norm))
    assert norms == pytest.approx([norms[0]] * 3, rel=2e-5)


def test_runs_of_two_learning_rates_are_one_program_and_two_results(tiny: Tiny) -> None:
    setups = [Setup(tiny(f"--optimizer.learning_rate {rate}"), build_mesh(MeshSpec.parse(MESHES[0]))) for rate in RATES]
    steps: list[Any] = [make_train_step(setup) for setup in setups]
    shapes = [(setup.shapes, setup.batch_shapes, setup.peak_rate_shape) for setup in setups]
    texts = {step.lower(*args).as_text() for step, args in zip(steps, shapes, strict=True)}
    assert len(texts) == 1
    assert [float(setup.peak_rate) for setup in setups] == pytest.approx(RATES)
    assert steps[0].lower(*shapes[0][:2]).as_text() != steps[1].lower(*shapes[1][:2]).as_text()
