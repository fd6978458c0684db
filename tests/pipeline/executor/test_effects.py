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
from trellax.meshes.device_axes import mark_varying, varying_axes
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads, stages_from_layers
from trellax.schedules import build_schedule

from ..law import mesh_of
from ..tiny import grads_of, natural, plain_loss, tiny_given, worst

Golden = Callable[[str, str], None]

NUM_MICROBATCHES, BATCH, WIDTH, NUM_LAYERS = 4, 4, 3, 4
TOLERANCE = 2e-5  # sums in another order, in float32: see test_law.py


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
    layer: Any = watched.fns.layer

    def loss(layers: Any, shared: Any, microbatch: Any) -> jax.Array:
        x = watched.fns.first(shared, microbatch)
        for weight in layers:
            x = layer(weight, x, microbatch)
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


CALLS = {"pure_callback": jax.pure_callback, "io_callback": jax.experimental.io_callback}


def sine_of_the_host(kind: str, *, mark: Callable[[jax.Array, jax.Array], jax.Array], count: Counter[str]) -> Any:
    """Return sin with its gradient, both computed by numpy; each call on a device is counted."""

    def call(name: str, x: jax.Array) -> jax.Array:
        def on_host(x: Any) -> Any:
            count[name] += 1
            return getattr(np, name)(np.asarray(x))

        return mark(CALLS[kind](on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x), x)

    sine = jax.custom_vjp(lambda x: call("sin", x))
    sine.defvjp(lambda x: (sine(x), x), lambda x, grad: (grad * call("cos", x),))
    return sine


def mark_like(y: jax.Array, x: jax.Array) -> jax.Array:
    return mark_varying(y, varying_axes(x))


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [("2x1x2", "1f1b"), *(pytest.param(m, "zb-h1", marks=pytest.mark.slow) for m in ("2x1x2", "1x2x2"))],
)
def test_results_and_gradients_from_the_host_equal_one_device(kind: str, mesh: str, schedule: str) -> None:
    count: Counter[str] = Counter()
    sine, given = sine_of_the_host(kind, mark=mark_like, count=count), tiny_given(mesh, schedule=schedule)
    found = grads_of({"layer": lambda weight, x, _: x + sine(x @ weight)}, given)
    in_jax = {"layer": lambda weight, x, _: x + jnp.sin(x @ weight)}
    assert worst(found, jax.value_and_grad(plain_loss)(natural(given["params"]), given["batch"], in_jax)) <= TOLERANCE
    # On each of 2 devices along data or tensor, for each of 2 layers and 2 microbatches.
    assert count == {"sin": 8, "cos": 8}


@pytest.mark.parametrize("mesh", ["2x1x2", "1x1x1"])
@pytest.mark.parametrize("kind", CALLS)
def test_results_from_the_host_whose_gradient_would_be_summed_are_refused(kind: str, mesh: str, golden: Golden) -> None:
    """It was refused by another name with two ranks, and wrong with one."""
    sine = sine_of_the_host(kind, mark=lambda y, x: y, count=Counter())
    with pytest.raises(ScheduleError) as caught:
        grads_of({"layer": lambda weight, x, _: x + sine(x @ weight)}, tiny_given(mesh))
    golden(f"errors/pipeline/fns_{kind}.txt", f"{type(caught.value).__name__}: {caught.value}")


ORDERED: dict[str, Callable[[jax.Array], Any]] = {
    "print": lambda x: jax.debug.print("{}", x.sum(), ordered=True),
    "io_callback": lambda x: jax.experimental.io_callback(np.asarray, x, x, ordered=True),
}


@pytest.mark.parametrize("kind", ORDERED)
def test_calls_in_an_order_are_refused(kind: str, golden: Golden) -> None:
    def layer(weight: Any, x: jax.Array, _: Any) -> jax.Array:
        ORDERED[kind](x)
        return x + jnp.tanh(x @ weight)

    with pytest.raises(ScheduleError) as caught:
        grads_of({"layer": layer}, tiny_given("1x1x1"))
    golden(f"errors/pipeline/fns_ordered_{kind}.txt", f"{type(caught.value).__name__}: {caught.value}")
