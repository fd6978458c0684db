"""Optimizer steps give the same parameters on every mesh, with and without ZeRO."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from trellax.configs import RunConfig, load_config
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import natural_order
from trellax.train import Batches, Setup, TrainState, load_corpus, make_eval_step, make_train_step
from trellax.train.update.optimizer import make_learning_rate

Tiny = Callable[..., RunConfig]

MESHES = ["data=8", "data=2,tensor=2,pipe=2", "data=1,tensor=4,pipe=2"]
LAYOUTS = [*((mesh, "none") for mesh in MESHES), ("data=4,tensor=2,pipe=1", "layer")]
"""Meshes, and what data shards split. With tensor, tokens between layers are split too."""

NUM_STEPS = 20
RATES = [1e-3, 2e-3]

# The largest error of any entry, over the largest entry of its array. The gradients agree to about 1e-6; an AdamW step
# divides them by their own size plus epsilon. At the default epsilon of 1e-8 an entry whose gradient is rounding noise
# moves a full learning rate in a random direction, on one device too if summed in another order; at 1e-3 the step is a
# smooth function of the gradient, and twenty of them keep the order of 1e-6. A sum that is missing is off by 0.1.
SMOOTH = "--optimizer.epsilon 1e-3"
TOLERANCE = 2e-5


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Steps of one run, with the loss and the global gradient norm of each."""

    setup: Setup
    state: TrainState
    losses: list[float]
    norms: list[float]


def train_on(config: RunConfig, mesh: str, *, num_steps: int) -> Trained:
    spec = MeshSpec.parse(mesh)
    setup = Setup(config, build_mesh(spec, devices=jax.devices()[: spec.num_devices]))
    corpus = load_corpus(config.data)
    batches = Batches(
        corpus.train,
        seq_len=config.data.seq_len,
        batch_size=config.train.batch_size,
        microbatches=config.pipeline.microbatches,
        seed=0,
    )
    state, step, losses, norms = setup.init_state(), make_train_step(setup), [], []
    for index in range(num_steps):
        batch = jax.device_put(batches[index], setup.batch_sharding)
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return Trained(setup=setup, state=state, losses=losses, norms=norms)


@pytest.fixture(scope="module")
def smooth_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Twenty steps on each of the layouts."""
    corpus = tmp_path_factory.mktemp("step") / "corpus.txt"
    corpus.write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    words = ["--data.source", "text", "--data.paths", str(corpus), *SMOOTH.split()]
    return [
        train_on(load_config("tiny-llama", [*words, "--train.shard", shard]), mesh, num_steps=NUM_STEPS)
        for mesh, shard in LAYOUTS
    ]


def natural(state: TrainState) -> dict[str, np.ndarray]:
    tree = {"stages": natural_order(state.params.stages), "shared": state.params.shared}
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def largest_difference(ours: TrainState, theirs: TrainState) -> float:
    a, b = natural(ours), natural(theirs)
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(a[name]).max()) for name in a)


def test_twenty_steps_give_the_same_parameters_on_four_layouts(smooth_runs: list[Trained]) -> None:
    reference, *others = smooth_runs
    assert reference.losses[-1] < reference.losses[0] - 0.3
    for run in others:
        assert largest_difference(reference.state, run.state) < TOLERANCE


@pytest.mark.slow
def test_twenty_losses_are_the_same_at_the_default_epsilon(tiny: Tiny) -> None:
    expected, here = (train_on(tiny(), mesh, num_steps=NUM_STEPS) for mesh in MESHES[:2])
    assert here.losses == pytest.approx(expected.losses, rel=TOLERANCE)


@pytest.mark.slow
def test_gradient_accumulation_changes_nothing(tiny: Tiny) -> None:
    mesh = "data=2,tensor=2,pipe=2"
    whole = train_on(tiny(SMOOTH), mesh, num_steps=5)
    parts = train_on(tiny(f"{SMOOTH} --pipeline.microbatches 4"), mesh, num_steps=5)
    assert largest_difference(whole.state, parts.state) < TOLERANCE


@pytest.mark.parametrize("shard", ["optimizer", "step", pytest.param("layer", marks=pytest.mark.slow)])
def test_sharding_changes_where_the_state_lives_and_nothing_else(shard: str, tiny: Tiny) -> None:
    mesh = "data=4,tensor=1,pipe=2"
    whole = train_on(tiny(SMOOTH), mesh, num_steps=5)
    split = train_on(tiny(f"{SMOOTH} --train.shard {shard}"), mesh, num_steps=5)
    assert largest_difference(whole.state, split.state) < TOLERANCE

    def held(state: TrainState) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))

    assert held(split.state) < 0.3 * held(whole.state)
    assert jax.tree.map(lambda leaf: leaf.sharding, split.state) == split.setup.shardings


# Muon sets all singular values of the momentum near 1, so what is rounding noise in a small one is as large as any
# other part of the update: tolerances are those of a step whose gradients differ by 1e-6, times 100.
MUON = "--optimizer.kind muon --optimizer.epsilon 1e-3"


@pytest.mark.parametrize(
    ("mesh", "extra"),
    [
        ("data=2,tensor=2,pipe=2", "--train.shard layer"),
        pytest.param("data=4,tensor=2,pipe=1", "--train.shard step", marks=pytest.mark.slow),
        pytest.param("data=1,tensor=4,pipe=2", "", marks=pytest.mark.slow),
        pytest.param("data=8,tensor=1,pipe=1", "--train.shard optimizer", marks=pytest.mark.slow),
    ],
)
def test_muon_sees_whole_matrices_on_every_mesh(mesh: str, extra: str, tiny: Tiny) -> None:
    alone = train_on(tiny(MUON), "data=1", num_steps=3)
    split = train_on(tiny(f"{MUON} {extra}"), mesh, num_steps=3)
    assert split.losses == pytest.approx(alone.losses, rel=1e-4)
    assert largest_difference(alone.state, split.state) < 1e-3


def test_muon_changes_every_kernel_by_as_much(tiny: Tiny) -> None:
    run = train_on(tiny(f"{MUON} --optimizer.weight_decay 0"), "data=1", num_steps=1)
    before = run.setup.init_state().params.stages
    section = run.setup.config.optimizer
    rate = float(make_learning_rate(section, steps=run.setup.config.train.steps)(0))
    for path, old in jax.tree_util.tree_leaves_with_path(before):
        if path[-1].key == "kernel":
            new = dict(jax.tree_util.tree_leaves_with_path(run.state.params.stages))[path]
            sizes = np.sqrt(np.square(np.asarray(new - old, np.float64)).mean(axis=(-2, -1)))
            # The root mean square of an orthogonal matrix's entries, scaled to 0.2; Newton-Schulz is within 30%.
            np.testing.assert_allclose(sizes, 0.2 * rate, rtol=0.3)


def test_validation_loss_is_the_training_loss_of_the_same_batch(tiny: Tiny) -> None:
    config = tiny("--optimizer.learning_rate 1e-9 --pipeline.microbatches 2")
    run = train_on(config, "data=2,tensor=2,pipe=2", num_steps=1)
    corpus = load_corpus(config.data)
    batches = Batches(corpus.train, seq_len=32, batch_size=8, microbatches=2, seed=0)
    loss = make_eval_step(run.setup)(run.state, jax.device_put(batches[0], run.setup.batch_sharding))
    assert float(loss) == pytest.approx(run.losses[0], rel=1e-5)


def test_reported_norm_is_that_of_the_whole_gradient(smooth_runs: list[Trained]) -> None:
    # Of the first step, whose parameters are the same to the digit.
    norms = [run.norms[0] for run in smooth_runs]
    assert norms == pytest.approx([norms[0]] * len(norms), rel=2e-5)


def test_runs_of_two_learning_rates_are_one_program_and_two_results(tiny: Tiny) -> None:
    setups = [Setup(tiny(f"--optimizer.learning_rate {rate}"), build_mesh(MeshSpec.parse(MESHES[0]))) for rate in RATES]
    steps: list[Any] = [make_train_step(setup) for setup in setups]
    shapes = [(setup.shapes, setup.batch_shapes, setup.peak_rate_shape) for setup in setups]
    texts = {step.lower(*args).as_text() for step, args in zip(steps, shapes, strict=True)}
    assert len(texts) == 1
    assert [float(setup.peak_rate) for setup in setups] == pytest.approx(RATES)
    assert steps[0].lower(*shapes[0][:2]).as_text() != steps[1].lower(*shapes[1][:2]).as_text()
