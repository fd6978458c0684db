"""pipeline_grads and pipeline_loss agree, nothing leaks from bubbles, and any stage functions work."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.meshes import TrellaxError
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, pipeline_loss
from trellax.schedules import Schedule, build_schedule

from ..law import answer_of, beyond, errors_of, mesh_of, pipeline_step, small_model

Golden = Callable[[str, str], None]

NUM_LAYERS, WIDTH, BATCH = 8, 16, 24
SIX = ("naive", "gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "interleaved-zb-h1")

LOOPED = """
rank 0 | 0F0 0F1   . 2F0     2F1   .       . 2B0 2B1   .       . 0B0 0B1
rank 1 |   . 1F0 1F1   . 3F0+3B0 3F1+3B1   .   . 1B0 1B1   .   .   .
"""


def _first(shared: Any, microbatch: Any) -> jax.Array:
    return microbatch["x"]


def _layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    gate = microbatch["gate"][:, None]
    return x + gate * (jnp.tanh(x @ params["up"]["w"] + params["up"]["b"][None]) @ params["down"])


def _last(shared: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return ((x - microbatch["target"]) ** 2).sum() / (BATCH * WIDTH)


MLP = StageFns(first=_first, layer=_layer, last=_last)
"""A user's own model: plain functions and dicts, no shared parameters, a layer that looks at its microbatch."""


@cache
def mlp_params() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.1 * rng.standard_normal((NUM_LAYERS, *shape))).astype(np.float32)  # noqa: E731
    return {"up": {"w": draw(WIDTH, 2 * WIDTH), "b": draw(2 * WIDTH)}, "down": draw(2 * WIDTH, WIDTH)}


@cache
def mlp_batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal((BATCH, *shape)).astype(np.float32)  # noqa: E731
    return {"x": draw(WIDTH), "target": draw(WIDTH), "gate": draw()}


@cache
def mlp_reference() -> tuple[float, dict[str, Any]]:
    """Loss and gradients by plain autodiff over the whole batch."""

    def loss(params: dict[str, Any], batch: Any) -> jax.Array:
        x = _first({}, batch)
        for index in range(NUM_LAYERS):
            x = _layer(jax.tree.map(lambda leaf, index=index: leaf[index], params), x, batch)
        return _last({}, x, batch)

    value, grads = jax.device_get(jax.jit(jax.value_and_grad(loss))(mlp_params(), mlp_batch()))
    return float(value), grads


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Everything that the two functions take."""

    params: PipelineParams
    batch: dict[str, jax.Array]
    mesh: jax.sharding.Mesh
    schedule: Schedule

    def kwargs(self) -> dict[str, Any]:
        return {"mesh": self.mesh, "schedule": self.schedule}


def mlp(*, mesh: str = "2x1x4", schedule: str | Schedule = "1f1b", num_microbatches: int = 3) -> Mlp:
    devices = mesh_of(mesh)
    num_ranks = devices.shape["pipe"]
    if isinstance(schedule, str):
        num_chunks = 2 if schedule.startswith("interleaved") else 1
        schedule = build_schedule(
            schedule, num_ranks=num_ranks, num_microbatches=num_microbatches, num_chunks=num_chunks
        )
    lead = (schedule.num_chunks, num_ranks, -1)
    stages = jax.tree.map(lambda leaf: leaf.reshape(*lead, *leaf.shape[1:]), mlp_params())
    batch = {key: leaf.reshape(schedule.num_microbatches, -1, *leaf.shape[1:]) for key, leaf in mlp_batch().items()}
    return Mlp(
        params=PipelineParams(
            stages=jax.device_put(stages, NamedSharding(devices, P(None, "pipe"))),
            shared={},
        ),
        batch=jax.device_put(batch, NamedSharding(devices, P(None, "data"))),
        mesh=devices,
        schedule=schedule,
    )


def worst(actual: Any, expected: Any) -> float:
    """Return the largest error of any leaf, relative to the largest entry of that leaf."""
    error = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())  # noqa: E731
    return max(jax.tree.leaves(jax.tree.map(error, actual, expected)))


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("schedule", SIX)
def test_a_users_own_stage_function_equals_one_device(schedule: str) -> None:
    given = mlp(schedule=schedule)
    out = jax.jit(partial(pipeline_grads, MLP, **given.kwargs()))(params=given.params, batch=given.batch)
    loss, grads = mlp_reference()
    # Same sums in another order, in float32: see test_law.py.
    assert worst((out.loss, natural_order(out.grads.stages)), (loss, grads)) <= 2e-5


@pytest.mark.parametrize("mesh", ["1x1x1", "8x1x1"])
def test_a_users_own_stage_function_runs_without_a_pipeline(mesh: str) -> None:
    given = mlp(mesh=mesh)
    out = jax.jit(partial(pipeline_grads, MLP, **given.kwargs()))(params=given.params, batch=given.batch)
    loss, grads = mlp_reference()
    assert worst((out.loss, natural_order(out.grads.stages)), (loss, grads)) <= 2e-5


def _stack(params: Any) -> Any:
    """Both matrices as one, and the bias twice as large."""
    return {"both": jnp.stack([params["up"]["w"], params["down"].T]), "b": 2 * params["up"]["b"]}


def _stacked_layer(given: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return _layer({"up": {"w": given["both"][0], "b": given["b"] / 2}, "down": given["both"][1].T}, x, microbatch)


@pytest.mark.parametrize(("mesh", "schedule"), [("2x1x4", "zb-h1"), ("2x1x2", "interleaved-1f1b"), ("1x1x1", "1f1b")])
def test_gradients_are_those_of_the_parameters_whatever_layers_are_given(mesh: str, schedule: str) -> None:
    given = mlp(mesh=mesh, schedule=schedule)
    fns = replace(MLP, layer=_stacked_layer, prepare=_stack)
    out = jax.jit(partial(pipeline_grads, fns, **given.kwargs()))(params=given.params, batch=given.batch)
    loss, grads = mlp_reference()
    assert worst((out.loss, natural_order(out.grads.stages)), (loss, grads)) <= 2e-5


def test_a_schedule_of_two_chunks_equals_one_device() -> None:
    schedule = Schedule.parse(LOOPED, name="looped", num_microbatches=2, num_chunks=2)
    given = mlp(mesh="2x1x2", schedule=schedule)
    out = jax.jit(partial(pipeline_grads, MLP, **given.kwargs()))(params=given.params, batch=given.batch)
    loss, grads = mlp_reference()
    assert worst((out.loss, natural_order(out.grads.stages)), (loss, grads)) <= 2e-5


@pytest.mark.parametrize("mesh", ["2x1x4", "8x1x1"])
def test_loss_under_value_and_grad_equals_grads(mesh: str) -> None:
    given = mlp(mesh=mesh)
    out = jax.jit(partial(pipeline_grads, MLP, **given.kwargs()))(params=given.params, batch=given.batch)

    def loss_of(params: PipelineParams) -> jax.Array:
        return pipeline_loss(MLP, params=params, batch=given.batch, **given.kwargs())

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(given.params)
    assert bits((loss, grads)) == bits((out.loss, out.grads))


def test_gradient_of_a_scaled_loss_is_scaled() -> None:
    given = mlp()

    def loss_of(params: PipelineParams) -> jax.Array:
        return 2.0 * pipeline_loss(MLP, params=params, batch=given.batch, **given.kwargs())

    grads = jax.jit(jax.grad(loss_of))(given.params)
    expected = jax.tree.map(lambda g: 2.0 * g, mlp_reference()[1])
    assert worst(natural_order(grads.stages), expected) <= 2e-5


def test_gradients_come_in_the_dtype_of_the_parameters_under_grad() -> None:
    given = mlp()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), given.params)

    def loss_of(params: PipelineParams) -> jax.Array:
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return pipeline_loss(MLP, params=wide, batch=given.batch, **given.kwargs())

    grads = jax.eval_shape(jax.grad(loss_of), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("mesh", ["2x1x4", "1x1x1", "8x1x1"])
def test_forward_only_loss_equals_one_device(mesh: str) -> None:
    given = mlp(mesh=mesh)
    loss = jax.jit(partial(pipeline_loss, MLP, **given.kwargs()))(params=given.params, batch=given.batch)
    assert worst(loss, np.float32(mlp_reference()[0])) <= 2e-5


@pytest.mark.parametrize("schedule", SIX)
def test_nan_in_bubbles_changes_no_bit_of_a_users_model(schedule: str) -> None:
    given = mlp(schedule=schedule)
    run = partial(pipeline_grads, MLP, params=given.params, batch=given.batch, **given.kwargs())
    zeros, nan = jax.jit(partial(run, bubbles="zeros"))(), jax.jit(partial(run, bubbles="nan"))()
    assert bits(nan) == bits(zeros)


@pytest.mark.parametrize(
    "schedule", [name if name == "1f1b" else pytest.param(name, marks=pytest.mark.slow) for name in SIX]
)
def test_nan_in_bubbles_changes_no_bit_of_a_transformer(schedule: str) -> None:
    chunks = {"num_chunks": 2 if schedule.startswith("interleaved") else 1}
    sizes = {"num_microbatches": 3, "num_sequences": 24, **chunks}
    build = partial(pipeline_step, small_model(), mesh="1x2x4", schedule=schedule, **sizes)
    zeros, nan = build(bubbles="zeros"), build(bubbles="nan")
    assert bits(nan.run(nan.params, nan.batch)) == bits(zeros.run(zeros.params, zeros.batch))


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("1x8x1", marks=pytest.mark.slow)])
def test_gradients_are_float32_and_sharded_as_the_parameters(mesh: str) -> None:
    step = pipeline_step(small_model(), mesh=mesh, schedule="1f1b", num_microbatches=2, num_sequences=24)
    grads = step.run(step.params, step.batch)[0].grads
    differ = jax.tree.map(lambda g, p: not g.sharding.is_equivalent_to(p.sharding, g.ndim), grads, step.params)
    found = {jax.tree_util.keystr(path) for path, is_other in jax.tree_util.tree_leaves_with_path(differ) if is_other}
    assert found == set()
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


def _cut_batch(given: Mlp) -> Mlp:
    return replace(given, batch=jax.tree.map(lambda leaf: jnp.zeros((3, 7, *leaf.shape[2:])), given.batch))


MISTAKES: dict[str, Callable[[Mlp], Mlp]] = {
    "schedule_for_other_ranks": lambda given: replace(
        given, schedule=build_schedule("1f1b", num_ranks=2, num_microbatches=3)
    ),
    "stages_without_chunks": lambda given: replace(
        given, params=replace(given.params, stages=jax.tree.map(lambda leaf: leaf[0], given.params.stages))
    ),
    "scalar_stage_parameter": lambda given: replace(
        given, params=replace(given.params, stages={"scale": jnp.zeros(())})
    ),
    "no_stage_parameters": lambda given: replace(given, params=replace(given.params, stages={})),
    "other_number_of_microbatches": lambda given: replace(
        given, batch=jax.tree.map(lambda leaf: leaf[:2], given.batch)
    ),
    "batch_without_microbatches": lambda given: replace(given, batch={"x": jnp.zeros(5)}),
    "batch_over_data": _cut_batch,
}


@pytest.mark.parametrize("entry", [pipeline_grads, pipeline_loss])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_refused_before_anything_runs(name: str, entry: Callable[..., Any], golden: Golden) -> None:
    given = MISTAKES[name](mlp())
    with pytest.raises(TrellaxError) as caught:
        entry(MLP, params=given.params, batch=given.batch, **given.kwargs())
    golden(f"errors/pipeline/grads_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize("mesh", [pytest.param("2x2x1", marks=pytest.mark.slow), "1x2x2"])
def test_layers_written_out_equal_layers_looped_over(mesh: str) -> None:
    config, sizes = replace(small_model(), num_layers=4), {"num_microbatches": 2, "num_sequences": 16}
    choices: tuple[Literal["off", "on"], ...] = ("off", "on")
    steps = [pipeline_step(config, mesh=mesh, schedule="1f1b", unroll=unroll, **sizes) for unroll in choices]
    looped, written = (answer_of(step) for step in steps)
    assert beyond(errors_of(written, looped), tolerance=2e-5) == {}  # as in test_law.py, for the same reason
    runs: list[Any] = [step.run for step in steps]
    texts = [run.lower(step.params, step.batch).as_text() for run, step in zip(runs, steps, strict=True)]
    counts = [text.count("stablehlo.while") for text in texts]
    assert counts[1] < counts[0]
