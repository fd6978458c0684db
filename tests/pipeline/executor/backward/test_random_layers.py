"""Gradients of layers made of random primitives equal those of one device.

The tolerance is 1e-5 of a gradient's largest number: both sides run the same equations in float32, which the compiler
may fuse in other ways. A residual that is reused for what it is not is off by 1e-1 or more.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, stages_from_layers
from trellax.schedules import build_schedule

from ...law import mesh_of
from ...plain_vjp import plan_plain
from ...random_layers import Layer, primitives_of, random_inputs, random_layer

TOLERANCE = 1e-5
NUM_STEPS = 12
NUM_LAYERS, NUM_MICROBATCHES = 4, 3


def floats(params: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf for name, leaf in params.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}


def worst(actual: Any, expected: Any) -> float:
    """Return the largest error of any leaf, relative to the largest number of that leaf; infinite where not finite."""
    errors = []
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        is_finite = np.isfinite(a).all() and np.isfinite(b).all()
        errors.append(float(np.abs(a - b).max() / (np.abs(b).max() + 1e-3)) if is_finite else np.inf)
    return max(errors)


def every_way(layer: Layer, params: Any, microbatch: Any) -> tuple[Any, Any, Any]:
    """Return (y, gradients) by whole backwards and by halves, from residuals as data, and as `jax.vjp` has them."""
    vjp = plan_plain(layer, params, microbatch["x"], microbatch)
    split = vjp.halves(params, microbatch["x"], microbatch)

    def run(params: Any, microbatch: Any) -> tuple[Any, Any, Any]:
        x = microbatch["x"]
        y, saved = vjp.forward(params, x, microbatch)
        whole = vjp.backward(params, saved, microbatch, jnp.cos(y))
        dx, between = split.input_grad(params, saved, microbatch, jnp.cos(y))
        halves = split.weight_grad(params, between, microbatch), dx
        plain, pull = jax.vjp(lambda p, x: layer(params | p, x, microbatch), floats(params), x)
        return (y, whole), (y, halves), (plain, pull(jnp.cos(plain)))

    return jax.jit(run)(params, microbatch)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 60))])
def test_backward_and_halves_of_a_random_layer_equal_vjp(seed: int) -> None:
    params, microbatch = jax.tree.map(jnp.asarray, random_inputs(seed))
    whole, halves, plain = every_way(random_layer(seed, NUM_STEPS), params, microbatch)
    assert worst(whole, plain) <= TOLERANCE
    assert worst(halves, plain) <= TOLERANCE


def test_random_layers_hold_more_than_a_hundred_primitives() -> None:
    params, microbatch = random_inputs(0)
    found: set[str] = set()
    for seed in range(1, 25):
        found |= primitives_of(jax.make_jaxpr(random_layer(seed, NUM_STEPS))(params, microbatch["x"], microbatch).jaxpr)
    assert len(found) > 100


CASES = [
    (mesh, schedule)
    for mesh in ("2x1x2", "1x1x4", "1x1x1")
    for schedule in (("1f1b", "gpipe", "interleaved-1f1b", "zb-h1") if mesh != "1x1x1" else ("1f1b",))
    if (mesh, schedule) != ("1x1x4", "interleaved-1f1b")
]


def first(shared: Any, microbatch: Any) -> jax.Array:
    return microbatch["x"] * shared["scale"]


def last(shared: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return (jnp.cos(3 * x) * microbatch["gate"][:, None, None]).sum() * shared["scale"]


def reference(layer: Layer, params: Any, shared: Any, batch: Any) -> Any:
    """Loss and gradients of one device, a data shard of a microbatch after another: leaves of batch [parts, b, ...]."""

    def loss(own: Any, shared: Any) -> jax.Array:
        def part(microbatch: Any) -> jax.Array:
            x = first(shared, microbatch)
            for index in range(NUM_LAYERS):
                x = layer(jax.tree.map(lambda leaf: leaf[index], params | own), x, microbatch)  # noqa: B023
            return last(shared, x, microbatch)

        return jax.lax.map(part, batch).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(floats(params), shared)


def pipelined(layer: Layer, params: Any, shared: Any, batch: Any, *, mesh: str, schedule: str) -> Any:
    devices = mesh_of(mesh)
    num_ranks, num_chunks = devices.shape["pipe"], 2 if schedule.startswith("interleaved") else 1
    sizes = {"num_ranks": num_ranks, "num_chunks": num_chunks}
    plan = build_schedule(schedule, num_microbatches=NUM_MICROBATCHES, **sizes)
    cut = jax.tree.map(lambda leaf: leaf.reshape(NUM_MICROBATCHES, -1, *leaf.shape[2:]), batch)
    fns = StageFns(first=first, layer=layer, last=last)
    out = jax.jit(partial(pipeline_grads, fns, mesh=devices, schedule=plan))(
        params=PipelineParams(stages=stages_from_layers(jax.tree.map(jnp.asarray, params), **sizes), shared=shared),
        batch=jax.device_put(cut, NamedSharding(devices, P(None, "data"))),
    )
    return out.loss, (floats(natural_order(out.grads.stages)), out.grads.shared)


def check(mesh: str, schedule: str, seed: int) -> float:
    num_parts = NUM_MICROBATCHES * int(mesh[0])
    params, _ = random_inputs(seed, NUM_LAYERS)
    parts = [random_inputs(seed + part)[1] for part in range(num_parts)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    shared, layer = {"scale": jnp.float32(0.9)}, random_layer(seed, NUM_STEPS)
    actual = pipelined(layer, params, shared, batch, mesh=mesh, schedule=schedule)
    return worst(actual, reference(layer, params, shared, batch))


# Four random layers in a row make rounding larger by a factor of ten or so, in sums over microbatches in another order.
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("mesh", "schedule"), CASES)
def test_pipeline_of_random_layers_equals_one_device(mesh: str, schedule: str, seed: int) -> None:
    assert check(mesh, schedule, 1000 + seed) <= 10 * TOLERANCE
