"""Products in eight bits are products within the format's rounding, forward and backward; without qwix it is said."""

import builtins
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.collectives import enter_split
from trellax.layers.product import Matmuls, multiply
from trellax.meshes import ModelError

from .sharded import mesh_of, normal, place

B, T, D = 4, 8, 32
X, KERNEL, GRAD = normal(B, T, D), normal(D, 2, 16, seed=1), normal(B, T, 2, 16, seed=2)

needs_qwix = pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="needs trellax[quant]")


def run(x: Any, kernel: Any, grad: Any, *, matmuls: Matmuls) -> Any:
    y, vjp = jax.vjp(lambda x, kernel: multiply(x, kernel, dtype="bfloat16", matmuls=matmuls), x, kernel)
    return y, *vjp(grad.astype(y.dtype))


def distance(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_plain_product_is_the_product() -> None:
    y = multiply(jnp.asarray(X), jnp.asarray(KERNEL), dtype="float32")
    assert distance(y, np.einsum("btd,dgf->btgf", X, KERNEL)) < 1e-6


def check_rounding(found: Any) -> None:
    """e4m3 has 4 bits of mantissa, e5m2 has 3: a rounding of up to 2^-4 and 2^-3, of which half is usual."""
    exact = np.einsum("btd,dgf->btgf", X, KERNEL), np.einsum("btgf,dgf->btd", GRAD, KERNEL)
    exact = (*exact, np.einsum("btd,btgf->dgf", X, GRAD))
    errors = [distance(a, b) for a, b in zip(found, exact, strict=True)]
    assert 0.01 < errors[0] < 0.06
    assert all(0.02 < error < 0.12 for error in errors[1:])
    assert [leaf.dtype for leaf in found] == [jnp.bfloat16, jnp.float32, jnp.float32]


@needs_qwix
def test_eight_bits_are_within_their_rounding_and_no_better() -> None:
    check_rounding(jax.jit(lambda *args: run(*args, matmuls="fp8"))(X, KERNEL, GRAD))


@needs_qwix
def test_eight_bits_inside_shard_map_are_within_their_rounding_and_no_better() -> None:
    """Each device scales its own blocks; gradients are summed over the axes on which x and kernel are the same."""

    def column(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return multiply(*enter_split(x, kernel, ("tensor",)), dtype="bfloat16", matmuls="fp8")

    def region(x: jax.Array, kernel: jax.Array, grad: jax.Array) -> Any:
        y, vjp = jax.vjp(column, x, kernel)
        return y, *vjp(grad.astype(y.dtype))

    x, kernel, y = P("data"), P(None, None, "tensor"), P("data", None, None, "tensor")
    mesh = mesh_of("data=2,tensor=4")
    mapped = jax.shard_map(region, mesh=mesh, in_specs=(x, kernel, y), out_specs=(y, x, kernel))
    check_rounding(jax.jit(mapped)(X, KERNEL, GRAD))


@needs_qwix
def test_eight_bits_on_a_mesh_are_those_of_one_device() -> None:
    """Scales are of whole arrays, so only sums in float32 are split; their rounding may move a number to its neighbour
    in bfloat16, 2^-8."""
    devices = mesh_of("data=2,tensor=4")
    one = jax.jit(lambda *args: run(*args, matmuls="fp8"))(X, KERNEL, GRAD)
    with jax.set_mesh(devices):
        args = [
            place(X, ("batch", None, None), mesh=devices),
            place(KERNEL, (None, None, "ffn"), mesh=devices),
            place(GRAD, ("batch", None, None, "ffn"), mesh=devices),
        ]
        many = jax.jit(lambda *args: run(*args, matmuls="fp8"))(*args)
    assert max(distance(a, b) for a, b in zip(many, one, strict=True)) < 2**-8


@needs_qwix
def test_backward_keeps_its_input_in_eight_bits() -> None:
    _, vjp = jax.vjp(lambda x: multiply(x, jnp.asarray(KERNEL), dtype="bfloat16", matmuls="fp8"), jnp.asarray(X))
    # The kernel, which has as many numbers, too.
    assert [leaf.dtype for leaf in jax.tree.leaves(vjp) if leaf.size >= X.size] == [jnp.float8_e4m3fn] * 2


def test_without_qwix_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "qwix":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError) as error:
        multiply(jnp.asarray(X), jnp.asarray(KERNEL), dtype="bfloat16", matmuls="fp8")
    golden("errors/layers/fp8_without_qwix.txt", str(error.value))


def test_a_lone_row_with_a_twin_is_the_same_row_and_so_is_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs get for a single sequence in decoding, computed here on a CPU."""
    x, kernel = jnp.asarray(normal(1, 8)), jnp.asarray(normal(8, 4))

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sin(multiply(x, kernel, dtype=jnp.float32)).sum()

    alone = jax.value_and_grad(loss, argnums=(0, 1))(x, kernel)
    monkeypatch.setattr("trellax.layers.product.is_nvidia", lambda: True)
    assert "concatenate" in str(jax.make_jaxpr(loss)(x, kernel))
    twin = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)
    for one, other in zip(jax.tree.leaves(twin), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
