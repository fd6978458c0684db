"""With each of jax's switches a pipeline equals one device, or raises a readable error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.layers import Transformer
from trellax.meshes import TrellaxError
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, stages_from_layers
from trellax.schedules import build_schedule

from .law import mesh_of, small_model

M, B, WIDTH, COUNTS = 2, 4, 6, (2, 1)
TOLERANCE = 2e-5  # the same sums in another order, in float32: see test_law.py

FNS = StageFns(
    first=lambda shared, microbatch: microbatch["x"] @ shared["in"],
    layer=lambda params, x, microbatch: x + jnp.tanh(x @ params["w"]),
    last=lambda shared, x, microbatch: (x**2).sum() / (M * B),
    layers_per_stage=COUNTS,
    num_layers=sum(COUNTS),
)

WORKS: list[tuple[str, Any]] = [
    ("jax_enable_x64", True),
    ("jax_debug_nans", True),
    ("jax_debug_infs", True),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
    ("jax_enable_checks", True),
    ("jax_check_tracer_leaks", True),
    ("jax_transfer_guard", "disallow"),
    ("jax_default_matmul_precision", "highest"),
    ("jax_debug_key_reuse", True),
]
REFUSED: list[tuple[str, Any]] = [("jax_disable_jit", True), ("jax_auto_pcast", False)]

SAMPLE = "jax_enable_x64"
"""The switch with which most would break: each index and each zero that is left to Python gets 64 bits."""


@contextmanager
def switched(name: str, value: Any) -> Iterator[None]:
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Layers, a matrix of `first`, a batch."""
    rng = np.random.default_rng(0)
    shapes = ((sum(COUNTS), WIDTH, WIDTH), (WIDTH, WIDTH), (M, B, WIDTH))
    layers, enter, x = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return layers, enter, x


def loss_on_one_device(layers: jax.Array, enter: jax.Array, x: np.ndarray) -> jax.Array:
    h = x.reshape(M * B, WIDTH) @ enter
    for w in layers:
        h = h + jnp.tanh(h @ w)
    return (h**2).sum() / (M * B)


def pipelined(schedule: str) -> tuple[Callable[..., Any], Any]:
    """Return the step on 2x1x2, not yet compiled, and its arguments with their shardings."""
    mesh, (layers, enter, x) = mesh_of("2x1x2"), arrays()
    grid = build_schedule(schedule, num_ranks=2, num_microbatches=M)
    stages = {"w": stages_from_layers(jnp.asarray(layers), num_ranks=2, layers_per_stage=COUNTS)}
    there = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))  # noqa: E731
    params = PipelineParams(stages=there(stages, None, "pipe"), shared=there({"in": enter}))
    step = lambda params, batch: pipeline_grads(FNS, params=params, batch=batch, mesh=mesh, schedule=grid)  # noqa: E731
    return jax.jit(step), (params, there({"x": x}, None, "data"))


@pytest.mark.parametrize(
    ("name", "value"), [one if one[0] == SAMPLE else pytest.param(*one, marks=pytest.mark.slow) for one in WORKS]
)
def test_a_pipeline_equals_one_device_with_a_switch_of_jax(name: str, value: Any) -> None:
    step, given = pipelined("1f1b" if name == SAMPLE else "zb-h1")
    with switched(name, value):
        out = jax.block_until_ready(step(*given))
    layers, enter, x = arrays()
    loss, (d_layers, d_enter) = jax.value_and_grad(loss_on_one_device, argnums=(0, 1))(layers, enter, x)
    ours = natural_order(out.grads.stages, layers_per_stage=COUNTS)["w"]
    for actual, expected in ((out.loss, loss), (ours, d_layers), (out.grads.shared["in"], d_enter)):
        assert actual.dtype == np.float32
        assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "large"), [("jax_debug_nans", np.nan), ("jax_debug_infs", 1e38)])
def test_a_number_that_is_not_finite_is_found_inside_a_pipeline(name: str, large: float) -> None:
    fns = replace(FNS, layer=lambda params, x, microbatch: large * x)
    mesh, (params, batch) = mesh_of("2x1x2"), pipelined("1f1b")[1]
    grid = build_schedule("1f1b", num_ranks=2, num_microbatches=M)
    step = jax.jit(lambda p, b: pipeline_grads(fns, params=p, batch=b, mesh=mesh, schedule=grid))
    with switched(name, True), pytest.raises(FloatingPointError):
        jax.block_until_ready(step(params, batch))


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_jax_option_that_pipelines_cannot_run_with_is_refused_by_name(
    name: str, value: Any, golden: Callable[[str, str], None]
) -> None:
    step, given = pipelined("1f1b")
    with switched(name, value), pytest.raises(TrellaxError) as caught:
        step(*given)
    golden(f"errors/pipeline/switch_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


@pytest.mark.parametrize(
    ("style", "name", "value"),
    [
        ("gpt", "jax_enable_x64", True),
        ("qwen", "jax_numpy_dtype_promotion", "strict"),
        pytest.param("qwen", "jax_enable_x64", True, marks=pytest.mark.slow),
        pytest.param("gpt", "jax_numpy_dtype_promotion", "strict", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_of_a_transformer_are_float32_with_a_switch_of_jax(
    style: str, name: str, value: Any
) -> None:
    config = replace(small_model(style=style, dtype="bfloat16"), num_layers=2)
    graph, params = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 16), jnp.float32)

    def loss(params: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).loss(tokens, tokens, weights)

    with switched(name, value):
        found = jax.eval_shape(jax.value_and_grad(loss), params, tokens, weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
