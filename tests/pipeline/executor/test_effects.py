"""Side effects of a user's functions, such as prints, happen as often as on one device, and only on real values.

Each device of data runs its part of a microbatch, so with data=2 it happens twice as often. Ends that ranks run
together are left out: there each rank of the pipe runs them.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.meshes import ScheduleError
from trellax.pipeline import PipelineParams, StageFns, build_schedule, pipeline_grads, stages_from_layers

from ..law import mesh_of

Golden = Callable[[str, str], None]

NUM_MICROBATCHES, BATCH, WIDTH, NUM_LAYERS = 4, 4, 3, 4


class Watched:
    """Functions that note which of them ran, and on what."""

    def __init__(self, *, is_recomputed: bool = False) -> None:
        self.counts: Counter[str] = Counter()
        self.values: list[float] = []
        layer = jax.checkpoint(self.layer) if is_recomputed else self.layer
        self.fns = StageFns(first=self.first, layer=layer, last=self.last)

    def note(self, name: str, value: jax.Array) -> None:
        def add(value: Any) -> None:
            self.counts[name] += 1
            self.values.append(float(value))

        jax.debug.callback(add, value)

    def first(self, shared: Any, microbatch: Any) -> jax.Array:
        x = microbatch["x"] * shared["scale"][None]
        self.note("first", jnp.sum(1 / x))
        return x

    def layer(self, weight: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        # Not finite on zeros.
        self.note("layer", jnp.sum(1 / x))
        self.note("weight", jnp.sum(1 / weight))
        return self.pull(x + jnp.tanh(x @ weight))

    def pull(self, y: jax.Array) -> jax.Array:
        """Return y, and note its gradient."""
        same = jax.custom_vjp(lambda y: y)

        def backward(_: None, grad: jax.Array) -> tuple[jax.Array]:
            self.note("gradient", jnp.sum(1 / grad))
            return (grad,)

        same.defvjp(lambda y: (y, None), backward)
        return same(y)

    def last(self, shared: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        loss = (x**2).sum()
        self.note("last", loss)
        return loss


def inputs() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.uniform(0.1, 0.4, shape).astype(np.float32)  # noqa: E731
    return draw(NUM_LAYERS, WIDTH, WIDTH), {"scale": draw(WIDTH)}, {"x": draw(NUM_MICROBATCHES, BATCH, WIDTH)}


def run_pipeline(fns: StageFns, *, mesh: str, schedule: str) -> Any:
    devices = mesh_of(mesh)
    sizes = {"num_ranks": devices.shape["pipe"], "num_chunks": 2 if schedule.startswith("interleaved") else 1}
    plan = build_schedule(schedule, num_microbatches=NUM_MICROBATCHES, **sizes)
    layers, shared, batch = inputs()
    params = PipelineParams(stages=stages_from_layers(jnp.asarray(layers), **sizes), shared=shared)
    step = jax.jit(partial(pipeline_grads, fns, mesh=devices, schedule=plan, bubbles="nan"))
    out = jax.block_until_ready(step(params=params, batch=batch))
    jax.effects_barrier()
    return out


def count_on_one_device(watched: Watched) -> Counter[str]:
    layers, shared, batch = inputs()

    def loss(layers: Any, shared: Any, microbatch: Any) -> jax.Array:
        x = watched.fns.first(shared, microbatch)
        for weight in layers:
            x = watched.fns.layer(weight, x, microbatch)
        return watched.fns.last(shared, x, microbatch)

    grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for index in range(NUM_MICROBATCHES):
        jax.block_until_ready(grads(layers, shared, jax.tree.map(lambda leaf: leaf[index], batch)))  # noqa: B023
    jax.effects_barrier()
    return watched.counts


QUICK = {("2x1x2", "1f1b"), ("1x1x1", "1f1b")}
CASES = [
    pytest.param(mesh, schedule, marks=() if (mesh, schedule) in QUICK else pytest.mark.slow)
    for mesh in ("2x1x2", "1x1x4", "1x1x1", "2x1x1", "1x2x2")
    for schedule in ("1f1b", "naive", "gpipe", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1", "auto")
    if not mesh.endswith("x1") or schedule == "1f1b"
    if not (mesh == "1x1x4" and schedule.startswith("interleaved"))
]


@pytest.mark.parametrize(("mesh", "schedule"), CASES)
def test_effects_happen_as_often_as_on_one_device_and_on_real_values(mesh: str, schedule: str) -> None:
    watched, alone = Watched(), Watched()
    run_pipeline(watched.fns, mesh=mesh, schedule=schedule)
    once, num_shards = count_on_one_device(alone), int(mesh[0])
    assert watched.counts == Counter({name: num_shards * count for name, count in once.items()})
    assert once["layer"] == once["gradient"] == NUM_LAYERS * NUM_MICROBATCHES
    assert np.isfinite(watched.values).all()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_effects_of_rematerialised_layers_happen_again_as_on_one_device(schedule: str) -> None:
    watched, alone = Watched(is_recomputed=True), Watched(is_recomputed=True)
    run_pipeline(watched.fns, mesh="2x1x2", schedule=schedule)
    once = count_on_one_device(alone)
    assert watched.counts == Counter({name: 2 * count for name, count in once.items()})
    assert once["layer"] == 2 * once["gradient"]
    assert np.isfinite(watched.values).all()


@pytest.mark.slow
def test_nan_checks_of_jax_find_none() -> None:
    with jax.debug_nans(True):
        run_pipeline(Watched().fns, mesh="2x1x2", schedule="1f1b")


@pytest.mark.parametrize("kind", ["pure_callback", "io_callback"])
def test_results_from_the_host_are_refused(kind: str, golden: Golden) -> None:
    call = {"pure_callback": jax.pure_callback, "io_callback": jax.experimental.io_callback}[kind]

    @jax.custom_jvp
    def ask(x: jax.Array) -> jax.Array:
        return call(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    ask.defjvp(lambda primals, tangents: (ask(primals[0]), tangents[0] * jnp.cos(primals[0])))
    fns = Watched().fns
    asking = StageFns(first=fns.first, layer=lambda weight, x, _: x + ask(x @ weight), last=fns.last)
    with pytest.raises(ScheduleError) as caught:
        run_pipeline(asking, mesh="2x1x2", schedule="1f1b")
    golden(f"errors/pipeline/fns_{kind}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_calls_in_an_order_are_refused(golden: Golden) -> None:
    def layer(weight: Any, x: jax.Array, _: Any) -> jax.Array:
        jax.debug.print("{}", x.sum(), ordered=True)
        return x + jnp.tanh(x @ weight)

    fns = Watched().fns
    with pytest.raises(ScheduleError) as caught:
        run_pipeline(StageFns(first=fns.first, layer=layer, last=fns.last), mesh="1x1x1", schedule="1f1b")
    golden("errors/pipeline/fns_ordered.txt", f"{type(caught.value).__name__}: {caught.value}")
