"""Stacks of several kinds of layers equal one device: other shapes, aux losses and state in each kind."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.layers.collectives import enter_split, sum_blocks
from trellax.meshes import ScheduleError
from trellax.pipeline import (
    LayerInfo,
    Output,
    PipelineParams,
    StageFns,
    natural_order,
    pipeline_grads,
    stages_from_layers,
)
from trellax.schedules import build_schedule

from .law import mesh_of

WIDTH, HIDDEN, BATCH = 16, 32, 24
PATTERN = ("dense", "dense", "gated")
TOLERANCE = 2e-5  # as in test_law.py, for the same reason

CASES = (
    ("1x1x1", "1f1b", 1, 3, (8,)),
    ("2x1x4", "1f1b", 1, 3, (2, 2, 2, 2)),
    ("1x2x4", "zb-h1", 1, 6, (1, 3, 3, 1)),
    ("2x2x2", "interleaved-1f1b", 2, 3, (2, 2, 2, 2)),
    ("4x1x2", "gpipe", 1, 2, (5, 3)),
)
"""Mesh (data x tensor x pipe), schedule, chunks, microbatches, layers of each stage."""


def dense(params: Any, x: jax.Array, _microbatch: Any) -> jax.Array:
    """An MLP with hidden features split over tensor."""
    x_split, up = enter_split(x, params["up"], ("tensor",))
    h = jnp.tanh(x_split @ up)
    return x + sum_blocks(h @ params["down"], ("tensor",))


def gated(params: Any, x: jax.Array, _microbatch: Any, info: LayerInfo) -> Output:
    gate = jax.nn.softmax(x * params["gate"][None] + info.state[None])
    loss = 0.01 * (gate**2).sum() / BATCH * (1 + info.index)
    return Output(x=x + gate * x, loss=loss, metrics={"gates": loss}, stats=gate.sum(0))


def first(shared: Any, microbatch: Any) -> jax.Array:
    return microbatch["x"] @ shared


def last(shared: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return ((x @ shared.T - microbatch["y"]) ** 2).sum() / (BATCH * WIDTH)


FNS: dict[str, Any] = {
    "first": first,
    "layer": {"dense": dense, "gated": gated},
    "last": last,
    "pattern": PATTERN,
    "num_layers": 8,
    "stage_specs": {"dense": {"up": P(None, "tensor"), "down": P("tensor")}, "gated": P()},
}


@cache
def arrays() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Parameters by kind in the model's order (8 layers: dense 0 1 3 4 6 7, gated 2 5), and a batch [B, ...]."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    layers = {
        "dense": {"up": draw(6, WIDTH, HIDDEN), "down": draw(6, HIDDEN, WIDTH)},
        "gated": {"gate": draw(2, WIDTH)},
    }
    state = {"dense": {"unused": draw(6, 1)}, "gated": draw(2, WIDTH)}
    return {"layers": layers, "shared": draw(WIDTH, WIDTH), "state": state}, {
        "x": draw(BATCH, WIDTH),
        "y": draw(BATCH, WIDTH),
    }


def on_one_device(params: dict[str, Any], batch: dict[str, Any]) -> tuple[jax.Array, Any]:
    x, loss, stats = first(params["shared"], batch), 0.0, []
    seen = {"dense": 0, "gated": 0}
    for index in range(8):
        kind = PATTERN[index % 3]
        own, state = jax.tree.map(lambda leaf: leaf[seen[kind]], (params["layers"][kind], params["state"][kind]))  # noqa: B023
        seen[kind] += 1
        if kind == "dense":
            x = dense(own, x, batch)
            continue
        where = jnp.int32(index)
        info = LayerInfo(index=where, stage=where, microbatch=where, sequences=jnp.arange(BATCH), state=state)
        out: Any = gated(own, x, batch, info)
        x, loss = out.x, loss + out.loss
        stats.append(out.stats)
    return loss + last(params["shared"], x, batch), (loss, jnp.stack(stats))


@pytest.mark.parametrize(("mesh_text", "name", "num_chunks", "num_microbatches", "counts"), CASES)
def test_a_pattern_of_two_kinds_equals_one_device(
    mesh_text: str, name: str, num_chunks: int, num_microbatches: int, counts: tuple[int, ...]
) -> None:
    mesh, (params, batch) = mesh_of(mesh_text), arrays()
    num_ranks = mesh.shape["pipe"]
    schedule = build_schedule(name, num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks)
    cut: dict[str, Any] = {"num_ranks": num_ranks, "num_chunks": num_chunks, "layers_per_stage": counts}
    stages, state = (
        stages_from_layers(jax.tree.map(jnp.asarray, params[part]), pattern=PATTERN, **cut)
        for part in ("layers", "state")
    )
    there = PipelineParams(
        stages=jax.device_put(stages, NamedSharding(mesh, P(None, "pipe"))),
        shared=jax.device_put(params["shared"], NamedSharding(mesh, P())),
    )
    own = {key: leaf.reshape(num_microbatches, -1, WIDTH) for key, leaf in batch.items()}
    fns = StageFns(layers_per_stage=counts, **FNS)

    @jax.jit
    def step(params: PipelineParams, batch: Any) -> Any:
        return pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=schedule, state=state, bubbles="nan")

    out = step(there, jax.device_put(own, NamedSharding(mesh, P(None, "data"))))
    (loss, (gates, stats)), grads = jax.value_and_grad(on_one_device, has_aux=True)(params, batch)
    ours = (
        out.loss,
        out.metrics["gates"],
        natural_order({"dense": {}, "gated": out.stats["gated"]}, layers_per_stage=counts, pattern=PATTERN)["gated"],
        natural_order(out.grads.stages, layers_per_stage=counts, pattern=PATTERN),
        out.grads.shared,
    )
    theirs = loss, gates, stats, grads["layers"], grads["shared"]
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True)
    for (path, actual), expected in pairs:
        assert actual.shape == np.shape(expected)
        assert np.abs(np.asarray(actual) - np.asarray(expected)).max() <= TOLERANCE * np.abs(expected).max(), path


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layer": dense}, "layer is one function, and pattern is"),
        ({"pattern": None}, "layer is a mapping of kinds, and pattern is None"),
        (
            {"pattern": ("dense", "gate")},
            "pattern names the kind 'gate', but layer has dense, gated",
        ),
        ({"pattern": ()}, "pattern is empty"),
        ({"num_layers": None}, "needs num_layers"),
        ({"prepare": {"moe": lambda own: own}}, r"prepare has the kinds \['moe'\], and layer \['dense', 'gated'\]"),
    ],
)
def test_kinds_that_do_not_fit_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ScheduleError, match=says):
        StageFns(**FNS | given)


def test_parameters_of_other_numbers_than_the_pattern_has_are_refused() -> None:
    layers = jax.tree.map(jnp.asarray, arrays()[0]["layers"])
    with pytest.raises(ScheduleError, match="makes 5 of 8 layers 'dense', but there are parameters of 6"):
        stages_from_layers(layers, num_ranks=2, pattern=("dense", "gated", "dense"))


def test_a_kind_without_arrays_is_refused() -> None:
    layers = {"dense": arrays()[0]["layers"]["dense"], "gated": {}}
    with pytest.raises(ScheduleError, match=r"layers\['gated'\] is empty"):
        stages_from_layers(layers, num_ranks=2, pattern=PATTERN)
    stages = stages_from_layers({"dense": layers["dense"]}, num_ranks=2, pattern=("dense",)) | {"gated": {}}
    with pytest.raises(ScheduleError, match=r"params.stages\['gated'\] has no arrays"):
        pipeline_grads(
            StageFns(**FNS),
            params=PipelineParams(stages=stages, shared=arrays()[0]["shared"]),
            batch={key: leaf.reshape(2, -1, WIDTH) for key, leaf in arrays()[1].items()},
            mesh=mesh_of("1x1x2"),
            schedule=build_schedule("1f1b", num_ranks=2, num_microbatches=2),
        )


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (None, "natural_order\\(\\) with a pattern needs layers_per_stage"),
        ((3, 5), r"stages\['dense'\]\[.down.\] has shape \(1, 2, 3, 32, 16\), but 2 stages of \[2, 4\] layers"),
        ((2, 3, 3), "3 stages"),
    ],
)
def test_kinds_are_put_in_order_by_the_counts_they_were_cut_by(counts: tuple[int, ...] | None, says: str) -> None:
    stages = stages_from_layers(jax.tree.map(jnp.asarray, arrays()[0]["layers"]), num_ranks=2, pattern=PATTERN)
    with pytest.raises(ScheduleError, match=says):
        natural_order(stages, layers_per_stage=counts, pattern=PATTERN)
