"""Rotary positions are multiplications by unit complex numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import rotate

from .sharded import differing, normal

B, T, N, H = 2, 16, 3, 8
X = normal(B, T, N, H)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_is_a_product_of_complex_numbers(theta: float) -> None:
    pairs = X[..., : H // 2] + 1j * X[..., H // 2 :]
    angles = np.arange(T)[:, None] * theta ** (-2 * np.arange(H // 2) / H)
    turned = pairs * np.exp(1j * angles)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert differing(rotate(jnp.asarray(X), theta=theta), expected) == {}


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = (jnp.broadcast_to(normal(1, 1, 1, H, seed=s), (1, T, 1, H)) for s in (1, 2))
    scores = jnp.einsum("btnh,bsnh->ts", rotate(query, theta=100.0), rotate(key, theta=100.0))
    assert differing(scores[1:, 1:], scores[:-1, :-1]) == {}


def test_first_token_is_not_turned() -> None:
    assert bool((rotate(jnp.asarray(X), theta=10_000.0)[:, 0] == X[:, 0]).all())


def test_type_of_the_heads_is_kept() -> None:
    assert rotate(jnp.asarray(X, jnp.bfloat16), theta=10_000.0).dtype == jnp.bfloat16
