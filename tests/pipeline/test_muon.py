"""optax's muon treats stacked layers as matrices only if `muon_weight_dimension_numbers` says so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers, muon


def update_of(optimizer: optax.GradientTransformation, params: Any, grads: Any) -> jax.Array:
    updates: Any = optimizer.update(grads, optimizer.init(params), params)[0]
    return updates["w"]


@pytest.mark.slow
def test_muon_told_of_the_dimensions_treats_every_layer_as_a_matrix() -> None:
    rng = np.random.default_rng(0)
    w, grad = (jnp.asarray(rng.standard_normal((1, 2, 2, 8, 4)), jnp.float32) for _ in range(2))
    pairs = zip(w.reshape(-1, 8, 4), grad.reshape(-1, 8, 4), strict=True)
    alone = jnp.stack([update_of(muon(0.01), {"w": one}, {"w": its}) for one, its in pairs]).reshape(w.shape)
    told = muon(
        0.01,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda p: MuonDimensionNumbers(-2, -1) if p.ndim == 5 else None, params
        ),
    )
    # The same sums, batched: float32 in another order.
    np.testing.assert_allclose(update_of(told, {"w": w}, {"w": grad}), alone, rtol=1e-5, atol=1e-7)
    # And why it must be told; this fails on the day that optax takes stacks for matrices.
    assert np.abs(update_of(muon(0.01), {"w": w}, {"w": grad}) - alone).max() > 0.1 * np.abs(alone).max()
