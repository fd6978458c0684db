"""Dropout: masks by sequence, the share of zeros, the scale, and bad arguments."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.context.places import order_chunks
from trellax.layers.dropout import dropout
from trellax.meshes import ModelError

from .sharded import mesh_of

KEYS = jax.random.split(jax.random.key(0), 64)
X = 1 + jnp.arange(64 * 100, dtype=jnp.float32).reshape(64, 100)


def test_a_share_is_zero_and_the_rest_is_scaled() -> None:
    y = dropout(X, rate=0.25, keys=KEYS)
    kept = np.asarray(y != 0)
    # 6,400 draws: the share of zeros has a standard deviation of 0.0054.
    assert abs(kept.mean() - 0.75) < 0.025
    np.testing.assert_allclose(y, jnp.where(kept, X / 0.75, 0), rtol=1e-6)


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_a_mask_belongs_to_its_sequence(kind: str) -> None:
    """With rbg, all masks were drawn from the key of the first sequence."""
    keys = jax.random.split(jax.random.key(0, impl=kind), 64)
    whole = dropout(X, rate=0.5, keys=keys)
    np.testing.assert_array_equal(dropout(X[10:20], rate=0.5, keys=keys[10:20]), whole[10:20])
    assert not np.array_equal(np.asarray(whole[0] != 0), np.asarray(whole[1] != 0))


@pytest.mark.parametrize("axes", ["context=4", "context=2,tensor=2"])
def test_context_ranks_draw_their_tokens_of_the_mask_of_a_sequence(axes: str) -> None:
    mesh, x, keys = mesh_of(axes), 1 + jnp.arange(2 * 16 * 4, dtype=jnp.float32).reshape(2, 16, 4), KEYS[:2]
    num_ranks, split = mesh.shape["context"], ("context", "tensor")
    own = partial(dropout, rate=0.5, keys=keys, tokens=("tensor",), context=("context",))
    run = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P(None, split), out_specs=P(None, split)))
    expected = order_chunks(np.asarray(dropout(x, rate=0.5, keys=keys)), num_ranks=num_ranks, dim=1)
    np.testing.assert_array_equal(run(order_chunks(x, num_ranks=num_ranks, dim=1)), expected)


def test_keys_in_the_old_style_draw_the_same_masks() -> None:
    rows = jax.random.split(jax.random.PRNGKey(0), 64)
    np.testing.assert_array_equal(dropout(X, rate=0.5, keys=rows), dropout(X, rate=0.5, keys=KEYS))


def test_the_gradient_has_the_mask_of_the_forward() -> None:
    y = dropout(X, rate=0.5, keys=KEYS)
    grad = jax.grad(lambda x: dropout(x, rate=0.5, keys=KEYS).sum())(X)
    np.testing.assert_allclose(grad, jnp.where(y != 0, 2.0, 0.0))


def test_bfloat16_stays() -> None:
    assert dropout(X.astype(jnp.bfloat16), rate=0.5, keys=KEYS).dtype == jnp.bfloat16


@pytest.mark.parametrize("rate", [1, 1.5, -0.1, float("nan")])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(ModelError, match="rate"):
        dropout(X, rate=rate, keys=KEYS)


def test_another_number_of_keys_is_refused() -> None:
    with pytest.raises(ModelError, match=r"x has 64 sequences and keys has shape \(3,\)"):
        dropout(X, rate=0.5, keys=KEYS[:3])


def test_masks_are_the_same_where_tokens_are_split() -> None:
    x = jnp.ones((64, 8, 4))
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.P(None, "tensor")

    def drop(x: jax.Array, keys: jax.Array) -> jax.Array:
        return dropout(x, rate=0.5, keys=keys, tokens=("tensor",))

    run = jax.shard_map(drop, mesh=mesh, in_specs=(spec, jax.P()), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(run)(x, KEYS), dropout(x, rate=0.5, keys=KEYS))
