"""Leaves with a batch dimension are split over data, all others are whole: the law with tables, scalars and keys."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import MeshSpec, TrellaxError, build_mesh
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, stages_from_layers
from trellax.schedules import build_schedule

from ..law import mesh_of

M, B, WIDTH, CLASSES, NUM_LAYERS = 3, 8, 6, 4, 4
TOLERANCE = 2e-5  # the same sums in another order, in float32: see test_law.py

Tree = dict[str, Any]


def first(shared: Tree, microbatch: Tree) -> jax.Array:
    return microbatch["x"][:, shared["columns"]] + 0.1 * jax.random.normal(microbatch["key"], (1, WIDTH))


def layer(params: Tree, x: jax.Array, microbatch: Tree) -> jax.Array:
    return x + jnp.tanh(x @ params["w"]) * microbatch["temperature"] * params["is_on"]


def last(shared: Tree, x: jax.Array, microbatch: Tree) -> jax.Array:
    logits = x @ shared["head"]
    weights = microbatch["class_weights"][microbatch["label"]]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), microbatch["label"][:, None], axis=1)[:, 0]
    return -(picked * weights).sum() / (M * B)


SPECS = {"x": P(None, "data"), "label": P(None, "data"), "class_weights": P(), "temperature": P(), "key": P()}
FNS = StageFns(first=first, layer=layer, last=last, batch_specs=SPECS)


@cache
def arrays() -> tuple[PipelineParams, Tree]:
    """Parameters in natural order, and a batch [M, ...]; of the tables each is [M, classes]."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    batch = {
        "x": draw(M, B, WIDTH),
        "label": rng.integers(0, CLASSES, (M, B), np.int32),
        "class_weights": np.abs(draw(M, CLASSES)),
        "temperature": np.abs(draw(M)),
        "key": jax.random.split(jax.random.key(7), M),
    }
    # Whole numbers among the parameters too: they take part, and have no gradient.
    stages = {"w": draw(NUM_LAYERS, WIDTH, WIDTH), "is_on": np.array([1, 0, 1, 2], np.int32)}
    shared = {"head": draw(WIDTH, CLASSES), "columns": rng.permutation(WIDTH).astype(np.int32)}
    return PipelineParams(stages=stages, shared=shared), batch


@cache
def on_one_device() -> tuple[jax.Array, PipelineParams]:
    params, batch = arrays()

    def loss(params: PipelineParams, batch: Tree) -> jax.Array:
        total = jnp.zeros(())
        for index in range(M):
            microbatch = jax.tree.map(lambda leaf, index=index: leaf[index], batch)
            x = first(params.shared, microbatch)
            for own in range(NUM_LAYERS):
                x = layer(jax.tree.map(lambda leaf, own=own: leaf[own], params.stages), x, microbatch)
            total += last(params.shared, x, microbatch)
        return total

    return jax.jit(jax.value_and_grad(loss, allow_int=True))(params, batch)


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        ("2x1x2", "1f1b"),
        pytest.param("4x1x1", "1f1b", marks=pytest.mark.slow),
        pytest.param("2x2x2", "zb-h1", marks=pytest.mark.slow),
    ],
)
def test_tables_numbers_and_keys_of_a_microbatch_are_whole_on_every_data_shard(mesh: str, schedule: str) -> None:
    devices, (params, batch) = mesh_of(mesh), arrays()
    num_ranks = devices.shape["pipe"]
    stages = stages_from_layers(params.stages, num_ranks=num_ranks)
    grid = build_schedule(schedule, num_ranks=num_ranks, num_microbatches=M)
    run = lambda p, b: pipeline_grads(FNS, params=p, batch=b, mesh=devices, schedule=grid)  # noqa: E731
    out = jax.jit(run)(PipelineParams(stages=stages, shared=params.shared), batch)
    loss, grads = on_one_device()
    ours = (out.loss, natural_order(out.grads.stages)["w"], out.grads.shared["head"])
    for actual, expected in zip(ours, (loss, grads.stages["w"], grads.shared["head"]), strict=True):
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert not np.any(out.grads.stages["is_on"])
    assert not np.any(out.grads.shared["columns"])


def _plain(**more: Any) -> Tree:
    return {"x": np.zeros((M, B, WIDTH), np.float32), **more}


TABLE = np.zeros((M, CLASSES), np.float32)
MISTAKES: dict[str, tuple[Any, Any]] = {
    "table of no batch": (_plain(table=TABLE), None),
    "raw key": (_plain(key=np.zeros((M, 2), np.uint32)), None),
    "nothing split": ({"temperature": np.zeros(M)}, None),
    "marked as split, with another size": (_plain(table=TABLE), P(None, "data")),
    "marked twice": (_plain(), {"x": P("data", "data")}),
    "split over tokens": (_plain(), {"x": P(None, None, "data")}),
    "split over tensor": (_plain(), {"x": P(None, "tensor")}),
    "split beyond its dimensions": (_plain(t=np.zeros(M)), P(None, "data")),
    "specs of another tree": (_plain(table=TABLE), {"x": P(None, "data")}),
    "specs in text": (_plain(), {"x": "data"}),
    "a list": ([[1.0, 2.0], [3.0]], None),
    "a number": (_plain(scale=1.0), None),
    "an array of no dimensions": (_plain(scale=np.float32(1)), None),
    "texts": (_plain(name=np.array(["a"] * M)), None),
    "nothing": ({}, None),
    "fewer microbatches": (_plain(t=np.zeros(2)), None),
    "sequences in one row": ({"x": np.zeros((2 * M, WIDTH))}, None),
    "sequences that do not divide": ({"x": np.zeros((M, 3, WIDTH))}, None),
    "no sequences": ({"x": np.zeros((M, 0, WIDTH))}, None),
}


def test_batch_that_would_be_cut_wrongly_is_refused(golden: Callable[[str, str], None]) -> None:
    mesh, grid = mesh_of("2x1x1"), build_schedule("1f1b", num_ranks=1, num_microbatches=M)
    stages = stages_from_layers(arrays()[0].stages, num_ranks=1)
    params, told = PipelineParams(stages=stages, shared=arrays()[0].shared), []
    for name, (batch, specs) in MISTAKES.items():
        fns = StageFns(first=first, layer=layer, last=last, batch_specs=specs)
        with pytest.raises(TrellaxError) as caught:
            pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=grid)
        told.append(f"# {name}\n{type(caught.value).__name__}: {caught.value}")
    golden("errors/pipeline/batch.txt", "\n".join(told))


TOKENS: dict[str, Any] = {
    "first": lambda shared, microbatch: microbatch["x"] * shared["scale"][None, None],
    "layer": lambda w, x, microbatch: x + jnp.tanh(x @ w),
    "last": lambda shared, x, microbatch: ((x - microbatch["y"]) ** 2 * microbatch["weights"][..., None]).sum() / M,
}
"""Functions of [b, T, D] that treat every token by itself."""


def token_step(mesh: str, **specs: Any) -> Any:
    """Return loss and gradients of a batch [M, B, T, D] on a mesh, in natural order of layers."""
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    spec = MeshSpec.parse(mesh)
    params = PipelineParams(
        stages=stages_from_layers(draw(NUM_LAYERS, WIDTH, WIDTH), num_ranks=spec.pipe), shared={"scale": draw(WIDTH)}
    )
    batch = {"x": draw(M, B, 8, WIDTH), "y": draw(M, B, 8, WIDTH), "weights": np.abs(draw(M, B, 8))}
    own: dict[str, Any] = {"mesh": build_mesh(spec, devices=jax.devices()[: spec.num_devices])}
    own["schedule"] = build_schedule("1f1b", num_ranks=spec.pipe, num_microbatches=M)

    def run(params: PipelineParams, batch: Tree) -> Any:
        return pipeline_grads(StageFns(**TOKENS, axes=spec.roles, **specs), params=params, batch=batch, **own)

    out = jax.jit(run)(params, batch)
    return out.loss, natural_order(out.grads.stages), out.grads.shared


def test_tokens_of_any_model_are_split_over_context() -> None:
    expected = token_step("pipe=1")
    actual = token_step("data=2,context=2,pipe=2", batch_specs=P(None, "data", "context"))
    for own, one in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(own, one, rtol=TOLERANCE, atol=TOLERANCE * float(jnp.abs(one).max()))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({}, "no leaf of the batch is split over context=2: its devices would all add the same loss"),
        (
            {"batch_specs": P(None, "data", None, "context")},
            r"batch_specs\['weights'\] is P.* for a leaf of shape \(3, 8, 8\)",
        ),
    ],
)
def test_a_batch_whole_over_context_is_refused(specs: dict[str, Any], message: str) -> None:
    with pytest.raises(TrellaxError, match=message):
        token_step("context=2,pipe=2", **specs)
