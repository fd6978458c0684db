"""Weight gradients of products in bfloat16 leave the product in float32, as they are summed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import Remat
from trellax.layers.block import rematerialize
from trellax.pipeline.executor.backward.equations import nested_equations
from trellax.pipeline.executor.backward.float32_grads import without_rounding

from ...plain_vjp import plan_plain

Layer = Callable[[Any, jax.Array, Any], jax.Array]

BFLOAT16 = jnp.bfloat16
X = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), BFLOAT16)
KERNEL = jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), BFLOAT16)
DY = jnp.asarray(np.random.default_rng(2).normal(size=(64, 8)), BFLOAT16)


def product(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return x @ params["kernel"]


def cast(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return x @ params["kernel"].astype(BFLOAT16)


def reshaped(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return jnp.einsum("nd,dhk->nhk", x, params["kernel"].reshape(8, 2, 4)).reshape(x.shape)


def called(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return jax.jit(jnp.matmul)(x, params["kernel"])


def rounded(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return jnp.matmul(x, params["kernel"], preferred_element_type=jnp.float32).astype(BFLOAT16)


def exact_gradient() -> np.ndarray:
    return np.asarray(X, np.float64).T @ np.asarray(DY, np.float64)


def gradient_of(layer: Layer, kernel: jax.Array) -> jax.Array:
    vjp = plan_plain(layer, params := {"kernel": kernel}, X, {})
    _, residuals = vjp.forward(params, X, {})
    return vjp.backward(params, residuals, {}, DY)[0]["kernel"]


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("layer", [product, cast, reshaped, called], ids=lambda layer: layer.__name__)
def test_gradient_is_not_rounded_to_bfloat16(layer: Layer, remat: Remat) -> None:
    kernel = KERNEL.astype(jnp.float32) if layer is cast else KERNEL
    grad = gradient_of(rematerialize(layer, remat), kernel)
    assert grad.dtype == jnp.float32
    # A sum of 64 products in float32 is off by 64 x 2^-24 of their sizes; rounded to bfloat16 by up to 2^-9.
    np.testing.assert_allclose(np.asarray(grad), exact_gradient(), rtol=1e-5, atol=1e-5)


def test_gradient_that_is_read_elsewhere_keeps_its_type() -> None:
    """Tied weights: the sum of two gradients is computed, not moved, so both products stay as they are."""

    def tied(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        return (x @ params["kernel"]) @ params["kernel"]

    assert gradient_of(tied, KERNEL).dtype == BFLOAT16


def test_gradient_of_x_keeps_its_type() -> None:
    vjp = plan_plain(product, params := {"kernel": KERNEL}, X, {})
    _, residuals = vjp.forward(params, X, {})
    assert vjp.backward(params, residuals, {}, DY)[1].dtype == BFLOAT16


def test_half_backward_makes_the_gradient_in_float32() -> None:
    vjp = plan_plain(product, params := {"kernel": KERNEL}, X, {})
    _, residuals = vjp.forward(params, X, {})
    halves = vjp.halves(params, X, {})
    _, kept = halves.input_grad(params, residuals, {}, DY)
    np.testing.assert_array_equal(
        halves.weight_grad(params, kept, {})["kernel"], vjp.backward(params, residuals, {}, DY)[0]["kernel"]
    )


def test_linear_function_without_its_casts() -> None:
    def prepare(params: Any) -> Any:
        both = jnp.concatenate([params["a"], params["b"]]).astype(BFLOAT16)
        return {"both": both, "scale": params["a"]}

    own = {"a": jnp.asarray([1.001, 2.0]), "b": jnp.asarray([3.003])}
    wide = without_rounding(prepare, own)
    assert wide(own)["both"].dtype == jnp.float32
    np.testing.assert_array_equal(wide(own)["both"], np.asarray([1.001, 2.0, 3.003], np.float32))


def test_program_of_a_layer_in_bfloat16_has_no_weight_gradient_in_bfloat16() -> None:
    vjp = plan_plain(rematerialize(product, "full"), params := {"kernel": KERNEL}, X, {})
    _, residuals = vjp.forward(params, X, {})
    traced = jax.make_jaxpr(vjp.backward)(params, residuals, {}, DY)
    products = [eqn for eqn in nested_equations(traced.jaxpr) if eqn.primitive.name == "dot_general"]
    results: list[Any] = [eqn.outvars[0].aval for eqn in products]
    assert [aval.dtype for aval in results if aval.shape == KERNEL.shape] == [jnp.float32]
