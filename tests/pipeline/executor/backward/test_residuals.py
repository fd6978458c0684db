"""A layer keeps for its backward the values that depend on its input, and nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import Remat
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads, split_transformer, stages_from_layers
from trellax.pipeline.executor.backward.equations import keeps_numbers
from trellax.schedules import build_schedule

from ...law import NUM_TOKENS, mesh_of, natural_params, small_model
from ...plain_vjp import plan_plain
from ...random_layers import random_inputs, random_layer

Layer = Callable[[Any, jax.Array, Any], jax.Array]


def matmul(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return x @ params["w"]


def cast_matmul(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def masked(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """Attention in small: scores under a causal mask and the microbatch's own mask."""
    causal = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
    scores = jnp.where(causal & microbatch["mask"], x @ params["w"] @ x.T, -1e9)
    return jax.nn.softmax(scores, axis=-1) @ x


def constant(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return params["w"][: x.shape[0]] * 2.0


TOYS: dict[str, Layer] = {"matmul": matmul, "cast": cast_matmul, "masked": masked, "constant": constant}
X = np.linspace(-1, 1, 6 * 8, dtype=np.float32).reshape(6, 8)
PARAMS = {"w": np.linspace(-0.5, 0.5, 64, dtype=np.float32).reshape(8, 8)}
MICROBATCH = {"mask": np.arange(36).reshape(6, 6) % 5 != 3}


def kept_shapes(layer: Layer) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in plan_plain(layer, PARAMS, jnp.asarray(X), MICROBATCH).kept]


def block(remat: Remat) -> tuple[Layer, Any]:
    """One block of a small transformer, with its parameters."""
    config = small_model(style="gpt")
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), natural_params(config)["blocks"])
    layer: Any = split_transformer(config, mesh=mesh, remat=remat).fns.layer
    return layer, params


def both_ways(layer: Layer, params: Any, x: jax.Array, microbatch: Any) -> tuple[Any, Any]:
    """Return (y, gradients) through the residuals as data, and as `jax.vjp` has them."""
    vjp = plan_plain(layer, params, x, microbatch)

    def split(params: Any, x: jax.Array) -> Any:
        y, residuals = vjp.forward(params, x, microbatch)
        return y, vjp.backward(params, residuals, microbatch, jnp.cos(y))

    def whole(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: layer(params, x, microbatch), params, x)
        return y, pull(jnp.cos(y))

    return jax.jit(lambda params, x: (split(params, x), whole(params, x)))(params, x)


def test_matmul_keeps_its_input_but_not_its_weight() -> None:
    assert kept_shapes(matmul) == [(6, 8)]


def test_cast_of_a_weight_is_not_kept() -> None:
    assert kept_shapes(cast_matmul) == [(6, 8)]


def test_masks_are_not_kept() -> None:
    kept = plan_plain(masked, PARAMS, jnp.asarray(X), MICROBATCH).kept
    assert [leaf.dtype for leaf in kept if leaf.dtype == jnp.bool_] == []


def test_layer_that_ignores_its_input_keeps_nothing() -> None:
    assert kept_shapes(constant) == []


@pytest.mark.parametrize("name", TOYS)
def test_backward_from_residuals_equals_vjp(name: str) -> None:
    actual, expected = both_ways(TOYS[name], PARAMS, jnp.asarray(X), MICROBATCH)
    # jax rounds the weight's gradient of a product in bfloat16, by up to 2^-9: see float32_grads.py.
    is_same = partial(np.allclose, rtol=2**-8, atol=1e-3) if name == "cast" else np.array_equal
    assert jax.tree.all(jax.tree.map(is_same, actual, expected))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_backward_of_a_block_equals_vjp(remat: Remat) -> None:
    layer, params = block(remat)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, NUM_TOKENS, 64), np.float32))
    actual, expected = both_ways(layer, params, x, None)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)
    assert jax.tree.all(same)


def test_block_keeps_no_weight_and_no_causal_mask() -> None:
    layer, params = block("none")
    x = jnp.zeros((2, NUM_TOKENS, 64))
    kept = plan_plain(layer, params, x, None).kept
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert [leaf for leaf in kept if leaf.shape in weights] == []
    assert [leaf for leaf in kept if leaf.dtype == jnp.bool_] == []


def test_block_with_full_remat_keeps_its_input_alone() -> None:
    layer, params = block("full")
    x = jnp.zeros((2, NUM_TOKENS, 64))
    assert [leaf.shape for leaf in plan_plain(layer, params, x, None).kept] == [x.shape]


def test_block_with_dots_keeps_less_than_without_remat() -> None:
    x = jnp.zeros((2, NUM_TOKENS, 64))

    def num_kept(remat: Remat) -> int:
        layer, params = block(remat)
        return sum(leaf.size for leaf in plan_plain(layer, params, x, None).kept)

    assert num_kept("full") < num_kept("dots") < num_kept("none")


def test_one_array_in_two_shapes_is_kept_once() -> None:
    def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        y = x @ params["w"]
        flat = y.reshape(-1)
        return y * y[::-1] + (flat * flat[::-1]).reshape(x.shape)

    kept = [leaf.shape for leaf in plan_plain(layer, PARAMS, jnp.asarray(X), MICROBATCH).kept]
    plain = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: layer(PARAMS, x, None), jnp.asarray(X))[1])]
    # y and flat are one array; both reversed are others.
    assert len(plain) - len(kept) >= 1
    assert (plain.count((48,)), kept.count((48,))) == (2, 1)
    actual, expected = both_ways(layer, PARAMS, jnp.asarray(X), MICROBATCH)
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))


def permuted(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """h and its transpose, as a reshape says it, are both kept: they have the same numbers in another order."""
    h = jnp.tanh(x)
    z = jax.lax.reshape(h, h.shape[::-1], dimensions=(1, 0))
    return x + 0.5 * (h @ params["w"]) + 0.5 * (z @ params["w"][:6, :6]).reshape(h.shape)


def column_major(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    h = jnp.tanh(x)
    flat = jnp.ravel(h, order="F")
    return h * h[::-1] + (flat * flat[::-1]).reshape(x.shape)


def twice_flat(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """Two reshapes that keep the order around one that does not."""
    h = jnp.tanh(x)
    turned = jax.lax.reshape(h.reshape(2, 24), (48,), dimensions=(1, 0)).reshape(12, 4)
    return h * h[::-1] + (turned * turned[::-1]).reshape(x.shape)


@pytest.mark.parametrize("layer", [permuted, column_major, twice_flat])
def test_a_permuted_array_is_not_a_copy(layer: Layer) -> None:
    actual, expected = both_ways(layer, PARAMS, jnp.asarray(X), MICROBATCH)
    assert jax.tree.all(jax.tree.map(partial(np.allclose, rtol=1e-6, atol=1e-6), actual, expected))


def test_a_copy_has_all_numbers_in_the_same_order() -> None:
    """Of all equations in random layers, each that is taken for a copy of its operand is run and compared."""
    params, microbatch = random_inputs(0)
    run_on: list[str] = []
    for seed in range(1, 6):
        jaxpr = jax.make_jaxpr(random_layer(seed, 12))(params, microbatch["x"], microbatch).jaxpr
        for eqn in filter(keeps_numbers, jaxpr.eqns):
            operand: Any = eqn.invars[0].aval
            numbers = np.arange(operand.size).reshape(operand.shape)
            result = eqn.primitive.bind(numbers, **eqn.params)
            assert np.array_equal(np.ravel(result), np.ravel(numbers))
            run_on.append(eqn.primitive.name)
    assert run_on.count("reshape") > 20


def test_a_gradient_written_by_hand_may_close_over_the_microbatch() -> None:
    def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        masked = jax.custom_vjp(jnp.sin)
        masked.defvjp(lambda y: (jnp.sin(y), y), lambda y, grad: (grad * jnp.cos(y) * microbatch["mask"].sum(),))
        return masked(x @ params["w"])

    actual, expected = both_ways(layer, PARAMS, jnp.asarray(X), MICROBATCH)
    assert jax.tree.all(jax.tree.map(partial(np.allclose, rtol=1e-6, atol=1e-6), actual, expected))


def test_backward_invents_no_value_for_the_input() -> None:
    """The backward reads parameters, residuals, microbatch and gradient: its program has no zeros of the input."""
    vjp = plan_plain(lambda params, x, _: jnp.log(x) @ params["w"], PARAMS, jnp.asarray(X), MICROBATCH)
    jaxpr = jax.make_jaxpr(lambda p, k, g: vjp.backward(p, k, MICROBATCH, g))(PARAMS, vjp.kept, X)
    assert "log" not in str(jaxpr)
    assert "broadcast_in_dim" not in str(jaxpr)


@pytest.mark.parametrize("mesh", ["1x1x1", pytest.param("2x1x2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("zb-h1", marks=pytest.mark.slow)])
def test_whole_numbers_have_no_gradient_buffers(mesh: str, schedule: str) -> None:
    """Quantised weights beside their scales: the gradient of the former is zeros of their own type, summed nowhere."""
    devices = mesh_of(mesh)
    num_ranks = devices.shape["pipe"]
    plan = build_schedule(schedule, num_ranks=num_ranks, num_microbatches=2)
    whole = np.arange(4 * 8 * 8).reshape(4, 8, 8) % 13
    stages = {"whole": jnp.asarray(whole, jnp.int8), "scale": jnp.full((4, 8), 0.02)}
    layer: Layer = lambda own, x, _: x + jnp.tanh(x @ (own["whole"] * own["scale"][None]))  # noqa: E731
    fns = StageFns(
        first=lambda shared, microbatch: microbatch["x"],
        layer=layer,
        last=lambda shared, x, _: (x**2).sum() * shared["factor"],
    )
    params = PipelineParams(stages=stages_from_layers(stages, num_ranks=num_ranks), shared={"factor": jnp.int32(2)})
    batch = {"x": jnp.asarray(np.stack([X, X[::-1]]))}
    run = partial(pipeline_grads, fns, mesh=devices, schedule=plan)
    out = jax.jit(run)(params=params, batch=batch)

    def loss(scale: jax.Array) -> jax.Array:
        x = jnp.concatenate(batch["x"])
        for index in range(4):
            x = layer({"whole": stages["whole"][index], "scale": scale[index]}, x, None)
        return fns.last(params.shared, x, None)

    assert np.allclose(out.grads.stages["scale"].reshape(4, 8), jax.jit(jax.grad(loss))(stages["scale"]), rtol=1e-5)
    assert (out.grads.stages["whole"].dtype, out.grads.shared["factor"].dtype) == (jnp.int8, jnp.int32)
    assert not out.grads.stages["whole"].any()
    # The carry of the loop over turns or microbatches: sums for scales, none for whole numbers.
    text = str(jax.make_jaxpr(lambda params, batch: run(params=params, batch=batch))(params, batch))
    assert f"f32[1,{4 // num_ranks},8]" in text
    assert f"f32[1,{4 // num_ranks},8,8]" not in text
