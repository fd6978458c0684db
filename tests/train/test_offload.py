"""With the optimizer's moments in host memory, steps change the same parameters by the same amounts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
import numpy as np
import pytest
from trellax.configs import RunConfig
from trellax.configs.check import check_run
from trellax.meshes import ConfigError, MeshError
from trellax.meshes.host_memory import is_in_host_memory
from trellax.train import Checkpoints, TrainState, make_train_step

from .test_step import Trained, train_on

Tiny = Callable[..., RunConfig]

NUM_STEPS = 20
LAYOUTS = [
    # 9 layers on each of 2 ranks, whose last part is smaller than the others.
    ("data=2,tensor=2,pipe=2", "none --model.num_layers 18", "adamw"),
    pytest.param("data=2,tensor=2,pipe=2", "optimizer", "muon", marks=pytest.mark.slow),
    pytest.param("data=4,tensor=1,pipe=2", "step", "adamw", marks=pytest.mark.slow),
    pytest.param("data=4,tensor=2,pipe=1", "layer", "adamw", marks=pytest.mark.slow),
    pytest.param("data=4,tensor=2,pipe=1", "layer", "muon", marks=pytest.mark.slow),
    pytest.param(
        "data=2,tensor=1,pipe=2",
        "layer --pipeline.schedule zb-v --pipeline.chunks 2 --model.num_layers 6",
        "adamw",
        marks=pytest.mark.slow,
    ),
]
"""Meshes, what data shards split and other words, and optimizers."""

# Each entry is computed by the same operations in the same order, only in other arrays: XLA may fuse multiply and add
# in one program and not in the other, which is one rounding, 6e-8, a step. An update that is missing is off by 1e-3.
TOLERANCE = 2e-6

# Muon multiplies stacks of matrices, whose sums XLA may order otherwise in a part of a stack, and sets small singular
# values near 1 with the rounding in them. For different meshes test_step.py allows 100 times its tolerance.
MUON_TOLERANCE = 10 * TOLERANCE


def differ(here: Any, there: Any) -> float:
    """Return the largest difference of any entry of two trees, over the largest entry of its array."""
    pairs = zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True)
    both = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1.0)) for a, b in both)


def train(config: RunConfig, mesh: str, *, num_steps: int = NUM_STEPS) -> Trained:
    return train_on(config, mesh, num_steps=num_steps)


@pytest.mark.parametrize(("mesh", "shard", "kind"), LAYOUTS)
def test_twenty_steps_equal_those_without_offload(mesh: str, shard: str, kind: str, tiny: Tiny) -> None:
    words = f"--pipeline.microbatches 2 --train.shard {shard} --optimizer.kind {kind}"
    whole = train(tiny(words), mesh)
    parts = train(tiny(f"{words} --train.offload optimizer"), mesh)
    most = MUON_TOLERANCE if kind == "muon" else TOLERANCE
    assert parts.losses == pytest.approx(whole.losses, rel=most)
    assert differ(parts.state.params, whole.state.params) <= most
    assert differ(parts.state.opt_state, whole.state.opt_state) <= most


def moments_of(state: TrainState) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]


def test_moments_are_born_on_the_host_and_stay_there(tiny: Tiny) -> None:
    trained = train(tiny("--train.offload optimizer"), "data=2,tensor=2,pipe=2", num_steps=1)
    born = trained.setup.init_state()
    assert all(is_in_host_memory(leaf) for leaf in [*moments_of(born), *moments_of(trained.state)])
    assert not any(is_in_host_memory(leaf) for leaf in jax.tree.leaves(trained.state.params))
    plain = train(tiny(), "data=2,tensor=2,pipe=2", num_steps=0).state
    assert differ(born.opt_state, plain.opt_state) == 0.0


def test_a_bad_step_leaves_moments_on_the_host_as_they_were(tiny: Tiny) -> None:
    config = tiny("--train.offload optimizer --train.bad_step skip --optimizer.learning_rate 1e-3")
    trained = train(config, "data=2,tensor=2,pipe=2", num_steps=1)
    before = jax.tree.map(np.asarray, (trained.state.params, trained.state.opt_state))
    shapes = trained.setup.batch_shapes
    batch = {name: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding) for name, leaf in shapes.items()}
    nan = np.full(shapes["weights"].shape, np.nan, np.float32)
    batch["weights"] = jax.device_put(nan, shapes["weights"].sharding)
    state, metrics = make_train_step(trained.setup)(trained.state, batch)
    assert not bool(metrics.taken)
    assert differ((state.params, state.opt_state), before) == 0.0


@pytest.mark.parametrize(
    ("saved", "resumed"), [("none", "optimizer"), ("optimizer", "none"), ("optimizer", "optimizer")]
)
def test_a_run_resumes_from_any_offload_to_any(saved: str, resumed: str, tiny: Tiny, tmp_path: Path) -> None:
    first = train(tiny(f"--train.offload {saved}"), "data=2,tensor=2,pipe=2", num_steps=3)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(first.state, first.setup)
    # Another mesh, on which one stage has all layers.
    second = train(tiny(f"--train.offload {resumed}"), "data=4,tensor=2,pipe=1", num_steps=0).setup
    with Checkpoints(tmp_path / "run") as checkpoints:
        state = checkpoints.restore(second)
        checkpoints.wait()
    assert [is_in_host_memory(leaf) for leaf in moments_of(state)] == [resumed == "optimizer"] * len(moments_of(state))
    back = train(tiny(f"--train.offload {saved}"), "data=2,tensor=2,pipe=2", num_steps=0).setup
    with Checkpoints(tmp_path / "again") as checkpoints:
        checkpoints.save(state, second)
        checkpoints.wait()
        returned = checkpoints.restore(back)
    assert differ((returned.params, returned.opt_state), (first.state.params, first.state.opt_state)) == 0.0


def test_twenty_steps_equal_those_with_residuals_on_the_device(tiny: Tiny) -> None:
    words = "--pipeline.microbatches 4 --pipeline.schedule gpipe"
    here, there = (
        train(tiny(f"{words} --train.offload {one}"), "data=2,tensor=2,pipe=2") for one in ("none", "residuals")
    )
    assert there.losses == pytest.approx(here.losses, rel=TOLERANCE)
    assert differ(there.state.params, here.state.params) <= TOLERANCE


def test_residuals_without_a_pipeline_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.offload='residuals' with mesh\.pipe=1: without a pipeline"):
        check_run(tiny("--train.offload residuals --mesh.data 2"), num_devices=2)


def test_jaxlib_that_copies_wrong_slices_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxlib, "__version__", "0.11.0")
    with pytest.raises(MeshError, match=r"train\.offload='optimizer': jaxlib 0\.11\.0 copies wrong slices"):
        train(tiny("--train.offload optimizer"), "data=1", num_steps=0).setup.check()


def test_devices_without_pinned_memory_are_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = train(tiny("--train.offload optimizer"), "data=1", num_steps=0).setup
    monkeypatch.setattr("trellax.meshes.host_memory.HOST", "remote_host")
    with pytest.raises(MeshError, match="cpu devices have no remote_host memory, only device, pinned_host, unpinned"):
        setup.check()
