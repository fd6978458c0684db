"""The average of the weights is that of numpy and of optax, on any mesh and however the state is split."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
import optax
import pytest
from trellax.configs import RunConfig
from trellax.configs.layout import layout_of, question_of
from trellax.configs.run_config import OptimizerSection
from trellax.hub import load_params
from trellax.hub.model_folder import open_model
from trellax.meshes import CheckpointError, MeshSpec, build_mesh
from trellax.pipeline import PipelineParams
from trellax.plan import price_layout, read_topology
from trellax.programs.memory import device_bytes
from trellax.train import (
    Batches,
    Checkpoints,
    Setup,
    TrainState,
    describe_run,
    load_corpus,
    make_train_step,
    weight_shapes,
)
from trellax.train.update.optimizer import AverageState, make_optimizer

from ..hub.hub import GOLDEN

Tiny = Callable[..., RunConfig]

NUM_STEPS, DECAY = 10, 0.9
LAYOUTS = [
    ("data=2,tensor=1,pipe=1", "optimizer"),
    ("data=2,tensor=2,pipe=2", "optimizer"),
    ("data=4,tensor=2,pipe=1", "none"),
    ("data=4,tensor=1,pipe=2", "step"),
    ("data=4,tensor=2,pipe=1", "layer"),
    ("data=2,tensor=1,pipe=2", "layer --optimizer.kind muon"),
    ("data=2,tensor=2,pipe=2", "optimizer --train.offload optimizer"),
]
"""Meshes, what data shards split and other words."""

# Three roundings a step, 6e-8 each, of which the average forgets a tenth a step.
TOLERANCE = 2e-6


def states_of(config: RunConfig, mesh: str, *, num_steps: int = NUM_STEPS) -> list[TrainState]:
    """Return the states before the first step and after each, as numpy arrays."""
    spec = MeshSpec.parse(mesh)
    setup = Setup(config, build_mesh(spec, devices=jax.devices()[: spec.num_devices]))
    sizes = {"seq_len": config.data.seq_len, "batch_size": config.train.batch_size}
    batches = Batches(load_corpus(config.data).train, **sizes, microbatches=config.pipeline.microbatches, seed=0)
    state, step = setup.init_state(), make_train_step(setup)
    found = [jax.tree.map(np.asarray, state)]
    for index in range(num_steps):
        state, _ = step(state, jax.device_put(batches[index], setup.batch_sharding))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == setup.shardings
        found.append(jax.tree.map(np.asarray, state))
    return found


def average_of(state: TrainState) -> Any:
    return state.opt_state[-1].average


def difference(here: Any, there: Any) -> float:
    # Some may lie in the memory of the host.
    pairs = zip(*(map(np.asarray, jax.tree.leaves(tree)) for tree in (here, there)), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_last_transformation_averages_the_weights_that_a_step_leads_to(kind: Literal["adamw", "muon"]) -> None:
    rng = np.random.default_rng(0)
    stages = {"kernel": rng.standard_normal((1, 1, 2, 4, 4)), "scale": rng.standard_normal((1, 1, 2, 4))}
    params = PipelineParams(stages=jax.tree.map(np.float32, stages), shared={"table": np.ones((8, 4), np.float32)})
    optimizer: Any = make_optimizer(OptimizerSection(learning_rate=0.1, kind=kind), steps=NUM_STEPS, ema=DECAY)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(params)
        ours = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
        for _ in range(3):
            grads = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), params)
            updates, state = optimizer.update(grads, state, params)
            params = jax.tree.map(np.add, params, updates)
            ours = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, ours, params)
    assert difference(state[-1].average, ours) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "words"), LAYOUTS)
def test_average_is_that_of_numpy_and_of_optax(mesh: str, words: str, tiny: Tiny) -> None:
    config = tiny(f"--train.ema {DECAY} --train.shard {words} --pipeline.microbatches 2 --optimizer.learning_rate 0.01")
    first, *states = states_of(config, mesh)
    assert difference(average_of(first), first.params) == 0
    ours = jax.tree.map(lambda leaf: leaf.astype(np.float64), first.params)
    ema: Any = optax.ema(DECAY, debias=False)
    theirs = ema.init(first.params)._replace(ema=first.params)
    for state in states:
        ours = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, ours, state.params)
        _, theirs = ema.update(state.params, theirs)
        assert difference(average_of(state), ours) < TOLERANCE
    assert difference(average_of(states[-1]), theirs.ema) < TOLERANCE
    # It is not the weights themselves, which have moved on.
    assert difference(average_of(states[-1]), states[-1].params) > 1e-3


def saved_run(config: RunConfig, mesh: str) -> tuple[Setup, TrainState]:
    """Save a state whose average is twice its weights, and return it."""
    setup = Setup(config, build_mesh(MeshSpec.parse(mesh)))
    state = setup.init_state()
    average = jax.tree.map(lambda leaf: 2 * leaf, average_of(state))
    state = replace(state, opt_state=(*state.opt_state[:-1], AverageState(average=average)))
    with Checkpoints(config.run_folder) as checkpoints:
        checkpoints.save(state, setup)
    return setup, state


@pytest.mark.slow
def test_average_is_restored_on_another_mesh_and_read_as_a_model(tiny: Tiny) -> None:
    config = tiny("--train.ema 0.9 --train.shard optimizer")
    saved_run(config, "data=2,tensor=2,pipe=2")
    with Checkpoints(config.run_folder) as checkpoints:
        restored = checkpoints.restore(other := Setup(config, build_mesh(MeshSpec.parse("data=4,tensor=2,pipe=1"))))
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == other.shardings
    assert difference(average_of(restored), jax.tree.map(lambda leaf: 2 * leaf, restored.params)) == 0
    last, average = (load_params(config.run_folder, weight_shapes(other), weights=own) for own in ("last", "ema"))
    assert difference(average, jax.tree.map(lambda leaf: 2 * leaf, last)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("words", ["none", "optimizer", "optimizer --train.offload optimizer"])
def test_average_begins_and_ends_where_a_run_is_resumed_with_another_decay(words: str, tiny: Tiny) -> None:
    mesh = build_mesh(MeshSpec.parse("data=4,tensor=2,pipe=1"))
    off, on = (Setup(tiny(f"--train.shard {words} --train.ema {decay}"), mesh) for decay in (0, 0.9))
    with Checkpoints(off.config.run_folder) as checkpoints:
        checkpoints.save(off.init_state(), off)
        checkpoints.wait()
        begun = checkpoints.restore(on)
        assert difference(average_of(begun), begun.params) == 0
        assert jax.tree.map(lambda leaf: leaf.sharding, begun) == on.shardings
        after, _ = make_train_step(on)(begun, next_batch(on), on.peak_rate)
        checkpoints.save(after, on)
        checkpoints.wait()
        ended = checkpoints.restore(off)
    assert int(ended.step) == 1
    assert jax.tree.structure(ended) == jax.tree.structure(off.shapes)


def next_batch(setup: Setup) -> Any:
    config = setup.config
    sizes = {"seq_len": config.data.seq_len, "batch_size": config.train.batch_size}
    batches = Batches(load_corpus(config.data).train, **sizes, microbatches=config.pipeline.microbatches, seed=0)
    return jax.device_put(batches[0], setup.batch_sharding)


@pytest.mark.slow
def test_average_of_a_run_without_one_is_refused(tiny: Tiny) -> None:
    config = tiny()
    setup = Setup(config, build_mesh(MeshSpec.parse("data=8")))
    with Checkpoints(config.run_folder) as checkpoints:
        checkpoints.save(setup.init_state(), setup)
    with pytest.raises(CheckpointError, match=r"holds no average of the weights: train\.ema was 0"):
        load_params(config.run_folder, weight_shapes(setup), weights="ema")


def test_average_of_a_hugging_face_folder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is no run folder: only a run holds an average"):
        open_model(GOLDEN / "llama3", weights="ema")


@pytest.mark.parametrize("words", ["optimizer", "none --train.offload optimizer"])
def test_planner_and_report_count_the_bytes_of_the_average(words: str, tiny: Tiny) -> None:
    config = tiny(f"--train.ema 0.9 --train.shard {words} --mesh.data 4 --mesh.pipe 2 --pipeline.microbatches 2")
    setup = Setup(config, build_mesh(config.mesh))
    report = describe_run(setup)
    found = report.numbers["average_bytes"]
    assert f"an average of the weights, {found:,} bytes a device (train.ema)" in report.mesh
    assert found == device_bytes(average_of(setup.shapes))
    layout = layout_of(config, num_devices=8)

    def planned(ema: float) -> float:
        own = config.model_copy(update={"train": config.train.model_copy(update={"ema": ema})})
        use = price_layout(question_of(own, topology=read_topology("h100x8")), layout).memory
        return use.optimizer + use.host

    # Rounded up to whole parts of norms; the model of the planner has the largest rank's.
    assert planned(0.9) - planned(0) == pytest.approx(found, rel=0.02)
