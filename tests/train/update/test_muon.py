"""Muon with whole matrices on one device each: optax's update and state on every mesh, two exchanges a kernel."""

from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers
from trellax.meshes import MeshSpec, build_mesh
from trellax.train.update.muon import make_muon

# Sums of five products of matrices, float32 in another order.
TOLERANCE = 2e-5
RMS, DECAY = 0.2, 0.1
SHAPES = {"up": (2, 2, 3, 8, 12), "down": (2, 2, 3, 12, 8), "experts": (2, 2, 3, 4, 8, 4)}
SPECS: dict[str, dict[str, Any]] = {
    "data=2,tensor=2,pipe=2": {
        # Not split over data: its ranks divide layers and gather updates. Three layers, two chunks: padded to eight.
        "up": P(None, "pipe", None, None, "tensor"),
        # Split over data too, as with ZeRO.
        "down": P(None, "pipe", None, "tensor", "data"),
        "experts": P(None, "pipe", None, ("data",), None, "tensor"),
    },
    "data=4,tensor=2,pipe=1": {
        "up": P(None, None, None, ("tensor", "data")),
        "down": P(None, None, None, "data", "tensor"),
        "experts": P(None, None, None, "data", "tensor"),
    },
    "data=8,tensor=1,pipe=1": {"up": P(), "down": P(None, None, None, None, "data"), "experts": P()},
}


def rate(step: Any) -> Any:
    return 0.1 / (1 + step)


def optax_muon() -> Any:
    return optax.contrib.muon(
        rate,
        weight_decay=DECAY,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree),
        consistent_rms=RMS,
    )


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def run(optimizer: Any, shardings: Any = None) -> tuple[Any, Any]:
    """Return parameters and state after three steps."""
    params = jax.device_put(draw(0), shardings)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    for seed in range(1, 4):
        params, state = step(params, state, jax.device_put(draw(seed), shardings))
    return params, state


@pytest.mark.parametrize("mesh", SPECS)
def test_update_and_state_are_those_of_optax_on_every_mesh(mesh: str) -> None:
    built = build_mesh(MeshSpec.parse(mesh))
    shardings = {name: NamedSharding(built, spec) for name, spec in SPECS[mesh].items()}
    ours = run(make_muon(rate, weight_decay=DECAY, shardings=shardings), shardings)
    theirs = run(optax_muon())
    # The same names: a run that was saved with optax's own transformation goes on.
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(own, other, atol=TOLERANCE * max(1.0, float(np.abs(other).max())))


def test_many_small_matrices_are_multiplied_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = run(optax_muon())[0]
    # Five matrices of [8, 12] at once, of twelve.
    monkeypatch.setattr("trellax.train.update.muon._AT_ONCE", 500)
    ours = run(make_muon(rate, weight_decay=DECAY))[0]
    for name, other in theirs.items():
        np.testing.assert_allclose(ours[name], other, atol=TOLERANCE)


def test_a_kernel_costs_two_exchanges_and_no_sums() -> None:
    built = build_mesh(MeshSpec.parse("data=2,tensor=2,pipe=2"))
    sharding = {"up": NamedSharding(built, P(None, "pipe", None, None, "tensor"))}
    optimizer = make_muon(rate, weight_decay=DECAY, shardings=sharding)
    params: Any = {"up": jax.ShapeDtypeStruct(SHAPES["up"], np.float32, sharding=sharding["up"])}
    state = jax.eval_shape(optimizer.init, params)

    def update(grads: Any, state: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params)

    jitted = jax.jit(update, out_shardings=(sharding, None))
    text = jitted.lower(params, state, params).compile().as_text() or ""
    counts = {kind: text.count(f" {kind}(") for kind in ("all-to-all", "all-gather", "all-reduce", "reduce-scatter")}
    # Over data, which splits nothing, each rank has updates of its layers to give.
    assert counts == {"all-to-all": 2, "all-gather": 1, "all-reduce": 0, "reduce-scatter": 0}
