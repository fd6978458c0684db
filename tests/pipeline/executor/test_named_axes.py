"""Functions may name every axis of the mesh, those of one device too, and results equal those of one device."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from ..tiny import FNS, Fns, grads_of, natural, plain_loss, tiny_given, worst

TOLERANCE = 2e-5  # sums in another order, in float32: see test_law.py

MESHES = ("1x1x1", "2x1x1", "1x1x2", "1x2x1", "2x1x2", "4x2x1", "1x2x2", "2x2x2", "4x1x1", "1x8x1")


def _normal(x: jax.Array, mean: Any) -> jax.Array:
    """As in batch norm: what is kept of it for the backward differs over pipe alone."""
    centred = x - mean(x.mean(0, keepdims=True))
    return centred * jax.lax.rsqrt(1 + mean((centred**2).mean(0, keepdims=True)))


def _fns(mean: Any, index: Any, zeros: Any) -> Fns:
    """Statistics over the whole microbatch, a loss that is summed over data already, marks and positions."""

    def layer(weight: jax.Array, x: jax.Array, _: Any) -> jax.Array:
        add = lambda sums, _: (sums + jnp.tanh(_normal(x, mean) @ weight), None)  # noqa: E731
        return x + jax.lax.scan(add, zeros(x), None, length=2)[0] + 0 * index()

    return {
        "layer": layer,
        "last": lambda shared, x, microbatch: mean(FNS["last"](shared, x, microbatch)),
    }


NAMED = _fns(
    mean=lambda x: jax.lax.pmean(x, "data"),
    # Of what differs over tensor a layer returns the sum.
    index=lambda: jax.lax.axis_index(("pipe", "data")) + jax.lax.psum(jax.lax.axis_index("tensor"), "tensor"),
    zeros=lambda x: jax.lax.pcast(jnp.zeros(x.shape), ("pipe", "data"), to="varying"),
)
PLAIN = _fns(mean=lambda x: x, index=lambda: 0, zeros=jnp.zeros_like)


@pytest.mark.parametrize(
    ("mesh", "schedule"),
    [
        *(pytest.param(mesh, "1f1b", marks=[] if mesh in ("1x2x1", "1x1x2") else pytest.mark.slow) for mesh in MESHES),
        *(pytest.param(mesh, "zb-h1", marks=pytest.mark.slow) for mesh in MESHES if mesh.endswith("x2")),
    ],
)
def test_functions_that_name_axes_run_on_every_mesh(mesh: str, schedule: str) -> None:
    given = tiny_given(mesh, schedule=schedule)
    found = grads_of(NAMED, given)
    expected = jax.value_and_grad(plain_loss)(natural(given["params"]), given["batch"], PLAIN)
    assert worst(found, expected) <= TOLERANCE


@pytest.mark.parametrize("mesh", ["2x1x1", pytest.param("4x1x2", marks=pytest.mark.slow)])
def test_a_loss_that_is_summed_over_data_has_the_gradient_of_what_is_reported(mesh: str) -> None:
    """It was smaller by the number of data shards."""
    given = tiny_given(mesh)
    shared_loss = lambda shared, x, m: jax.lax.pmean(FNS["last"](shared, x, m), "data")  # noqa: E731
    expected = jax.value_and_grad(plain_loss)(natural(given["params"]), given["batch"], {})
    assert worst(grads_of({"last": shared_loss}, given), expected) <= TOLERANCE
