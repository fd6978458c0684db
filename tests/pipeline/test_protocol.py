"""The full form of layers equals one device: trees, parts of the loss, metrics, stats, state, random numbers."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.pipeline import (
    LayerInfo,
    Output,
    PipelineParams,
    StageFns,
    natural_order,
    pipeline_grads,
    pipeline_loss,
    stages_from_layers,
)
from trellax.schedules import build_schedule

from .law import mesh_of

NUM_LAYERS, WIDTH, BATCH = 8, 16, 24
TOLERANCE = 2e-5  # as in test_law.py, for the same reason
KEY = jax.random.key(7)

CASES = (
    ("1x1x1", "1f1b", 1, 3),
    ("4x1x2", "1f1b", 1, 3),
    ("2x1x4", "zb-h1", 1, 6),
    ("1x2x4", "gpipe", 1, 2),
    ("2x2x2", "interleaved-1f1b", 2, 3),
    ("4x1x2", "interleaved-zb-h1", 2, 3),
    ("8x1x1", "gpipe", 1, 1),
)
"""Mesh (data x tensor x pipe), schedule, chunks, microbatches."""


@cache
def arrays() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters and state in natural order, and a batch [B, ...]."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    params = {
        "layers": {"w": draw(NUM_LAYERS, WIDTH, WIDTH), "gate": draw(NUM_LAYERS, WIDTH, WIDTH)},
        "shared": {"in": draw(WIDTH, WIDTH), "out": draw(WIDTH, WIDTH)},
        "state": {"bias": draw(NUM_LAYERS, WIDTH)},
    }
    batch = {"x": draw(BATCH, WIDTH), "y": draw(BATCH, WIDTH), "group": rng.integers(0, 3, BATCH).astype(np.int32)}
    return params, batch


def first(shared: Any, microbatch: Any) -> Any:
    """What travels: a hidden state, a skip connection beside it, and integers."""
    x = microbatch["x"] @ shared["in"]
    return {"h": x, "skip": jnp.tanh(x), "group": microbatch["group"]}


def layer(params: Any, x: Any, microbatch: Any, info: LayerInfo) -> Output:
    keys = info.keys()
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (WIDTH,)))(keys)
    load = jax.nn.softmax(x["h"] @ params["gate"] + info.state["bias"][None])
    scale = 1 + 0.1 * info.index.astype(jnp.float32) + 0.05 * x["group"][:, None].astype(jnp.float32)
    h = x["h"] + jnp.where(kept, jnp.tanh(x["h"] @ params["w"]) * load * scale, 0.0) + 0.1 * x["skip"]
    h = h + 0.01 * microbatch["y"]
    balance = (load**2).sum() / BATCH
    return Output(
        x={"h": h, "skip": 0.9 * x["skip"], "group": x["group"]},
        loss=0.1 * balance,
        metrics={"balance": balance, "by_layer": jax.nn.one_hot(info.index, NUM_LAYERS) * kept.sum()},
        stats={"load": load.sum(0)},
    )


def last(shared: Any, x: Any, microbatch: Any) -> Output:
    error = (x["h"] + x["skip"]) @ shared["out"] - microbatch["y"]
    loss = (error**2).sum() / (BATCH * WIDTH)
    return Output(loss=loss, metrics={"error": jnp.abs(error).max(1).sum()})


def on_one_device(params: dict[str, Any], batch: dict[str, Any]) -> tuple[Any, Any]:
    """The same computation on the whole batch, layer by layer in Python."""
    x, loss, stats = first(params["shared"], batch), 0.0, []
    metrics = {"balance": 0.0, "by_layer": np.zeros(NUM_LAYERS)}
    for index in range(NUM_LAYERS):
        own, bias = jax.tree.map(lambda leaf: leaf[index], (params["layers"], params["state"]))  # noqa: B023
        where = jnp.int32(index)
        sequences = jnp.arange(BATCH, dtype=jnp.int32)
        info = LayerInfo(index=where, stage=where, microbatch=where, sequences=sequences, key=KEY, state=bias)
        out: Any = layer(own, x, batch, info)
        x, loss = out.x, loss + out.loss
        stats.append(out.stats["load"])
        metrics = {name: total + out.metrics[name] for name, total in metrics.items()}
    end: Any = last(params["shared"], x, batch)
    return loss + end.loss, {"metrics": metrics | dict(end.metrics), "stats": {"load": jnp.stack(stats)}}


FNS = StageFns(first=first, layer=layer, last=last)


def placed(mesh_text: str, num_chunks: int, num_microbatches: int) -> tuple[Any, ...]:
    mesh, (params, batch) = mesh_of(mesh_text), arrays()
    ranks = mesh.shape["pipe"]
    to_stages = lambda tree: stages_from_layers(  # noqa: E731
        jax.tree.map(jnp.asarray, tree), num_ranks=ranks, num_chunks=num_chunks
    )
    split = NamedSharding(mesh, P(None, "pipe"))
    stages, state = jax.device_put((to_stages(params["layers"]), to_stages(params["state"])), split)
    shared = jax.device_put(params["shared"], NamedSharding(mesh, P()))
    cut = {name: leaf.reshape(num_microbatches, -1, *leaf.shape[1:]) for name, leaf in batch.items()}
    return (
        mesh,
        PipelineParams(stages=stages, shared=shared),
        state,
        jax.device_put(cut, NamedSharding(mesh, P(None, "data"))),
    )


def check(actual: Any, expected: Any) -> None:
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, ours), theirs in pairs:
        assert ours.shape == np.shape(theirs)
        scale = max(float(np.abs(theirs).max()), 1e-3)
        assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= TOLERANCE * scale, path


@pytest.mark.parametrize(("mesh_text", "name", "num_chunks", "num_microbatches"), CASES)
def test_the_full_form_equals_one_device(mesh_text: str, name: str, num_chunks: int, num_microbatches: int) -> None:
    mesh, params, state, batch = placed(mesh_text, num_chunks, num_microbatches)
    schedule = build_schedule(
        name, num_ranks=mesh.shape["pipe"], num_microbatches=num_microbatches, num_chunks=num_chunks
    )

    @jax.jit
    def step(params: PipelineParams, batch: Any) -> Any:
        return pipeline_grads(
            FNS, params=params, batch=batch, mesh=mesh, schedule=schedule, state=state, key=KEY, bubbles="nan"
        )

    out = step(params, batch)
    (loss, aux), grads = jax.value_and_grad(on_one_device, has_aux=True)(*arrays())
    check(out.loss, loss)
    check(natural_order(out.grads.stages), grads["layers"])
    check(out.grads.shared, grads["shared"])
    check(out.metrics, aux["metrics"])
    check(natural_order(out.stats), aux["stats"])


@pytest.mark.parametrize(("mesh_text", "name", "num_chunks", "num_microbatches"), CASES[1:5])
def test_the_gradient_of_the_batch_equals_one_device(
    mesh_text: str, name: str, num_chunks: int, num_microbatches: int
) -> None:
    mesh, params, state, batch = placed(mesh_text, num_chunks, num_microbatches)
    schedule = build_schedule(
        name, num_ranks=mesh.shape["pipe"], num_microbatches=num_microbatches, num_chunks=num_chunks
    )

    def loss_of(params: PipelineParams, floats: Any) -> Any:
        return pipeline_loss(
            FNS, params=params, batch=batch | floats, mesh=mesh, schedule=schedule, state=state, key=KEY, has_aux=True
        )

    floats = {name: batch[name] for name in ("x", "y")}
    (loss, aux), (grads, d_batch) = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))(params, floats)
    (own_loss, own_aux), (own, own_batch) = jax.value_and_grad(
        lambda params, floats: on_one_device(params, arrays()[1] | floats), argnums=(0, 1), has_aux=True
    )(arrays()[0], {name: arrays()[1][name] for name in ("x", "y")})
    check(loss, own_loss)
    check(aux.metrics, own_aux["metrics"])
    check(natural_order(grads.stages), own["layers"])
    check({name: leaf.reshape(BATCH, WIDTH) for name, leaf in d_batch.items()}, own_batch)


def test_random_numbers_of_rbg_belong_to_their_sequence() -> None:
    """rbg draws the numbers of many keys from the first, so they changed with mesh and number of microbatches."""
    key = jax.random.key(3, impl="rbg")

    def draw(params: Any, x: Any, microbatch: Any, info: LayerInfo) -> Output:
        drawn = jax.vmap(jax.random.normal)(info.keys())
        return Output(x=x, metrics={"by_sequence": jax.nn.one_hot(info.sequences, BATCH).T @ drawn})

    def drawn_on(mesh_text: str, num_microbatches: int) -> np.ndarray:
        mesh, params, _, batch = placed(mesh_text, 1, num_microbatches)
        schedule = build_schedule("1f1b", num_ranks=mesh.shape["pipe"], num_microbatches=num_microbatches)
        fns = StageFns(
            first=lambda shared, microbatch: microbatch["x"], layer=draw, last=lambda shared, x, microbatch: x.sum()
        )
        run = lambda: pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=schedule, key=key)  # noqa: E731
        return np.asarray(jax.jit(run)().metrics["by_sequence"])

    np.testing.assert_allclose(drawn_on("4x1x2", 3), drawn_on("1x1x1", 1), rtol=1e-5)


def test_sequences_are_counted_where_every_leaf_is_whole() -> None:
    seen: list[tuple[int, ...]] = []

    def look(params: Any, x: jax.Array, _microbatch: Any, info: LayerInfo) -> jax.Array:
        seen.append(info.sequences.shape)
        return x + params[None]

    fns = StageFns(
        first=lambda _shared, microbatch: microbatch,
        layer=look,
        last=lambda _shared, x, _microbatch: x.sum(),
        batch_specs=P(),
    )
    params = PipelineParams(stages=jnp.ones((1, 2, 1, 8)), shared={})
    schedule = build_schedule("gpipe", num_ranks=2, num_microbatches=2)
    jax.eval_shape(
        lambda batch: pipeline_loss(fns, params=params, batch=batch, mesh=mesh_of("1x1x2"), schedule=schedule),
        jnp.ones((2, 4, 8)),
    )
    assert set(seen) == {(4,)}
