"""Rotary positions are multiplications by unit complex numbers."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import ModelConfig
from trellax.layers.rope.frequencies import rope_frequencies
from trellax.layers.rope.rotary import rotate

from ..sharded import differing, normal, small_config

B, T, N, H = 2, 16, 3, 8
X = normal(B, T, N, H)


def config_of(theta: float = 10_000.0, **changes: Any) -> ModelConfig:
    return small_config("llama", head_size=H, rope_theta=theta, **changes)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rotation_is_a_product_of_complex_numbers(theta: float) -> None:
    pairs = X[..., : H // 2] + 1j * X[..., H // 2 :]
    angles = np.arange(T)[:, None] * theta ** (-2 * np.arange(H // 2) / H)
    turned = pairs * np.exp(1j * angles)[None, :, None]
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert differing(rotate(jnp.asarray(X), config=config_of(theta)), expected) == {}


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = (jnp.broadcast_to(normal(1, 1, 1, H, seed=s), (1, T, 1, H)) for s in (1, 2))
    scores = jnp.einsum("btnh,bsnh->ts", *(rotate(heads, config=config_of(100.0)) for heads in (query, key)))
    assert differing(scores[1:, 1:], scores[:-1, :-1]) == {}


def test_first_token_is_not_rotated() -> None:
    assert bool((rotate(jnp.asarray(X), config=config_of())[:, 0] == X[:, 0]).all())


def test_dtype_of_the_heads_is_kept() -> None:
    assert rotate(jnp.asarray(X, jnp.bfloat16), config=config_of()).dtype == jnp.bfloat16


def test_tokens_may_have_any_positions() -> None:
    places = np.array([[3, 1, 9, 0], [15, 15, 2, 7]])
    picked = jnp.take_along_axis(jnp.asarray(X), places[:, :, None, None], axis=1)
    expected = jnp.take_along_axis(rotate(jnp.asarray(X), config=config_of()), places[:, :, None, None], axis=1)
    assert differing(rotate(picked, config=config_of(), positions_BT=jnp.asarray(places)), expected) == {}


def test_linear_scaling_divides_every_frequency() -> None:
    scaled = rotate(jnp.asarray(X), config=config_of(rope_scaling="linear", rope_factor=4.0))
    slow = rotate(jnp.asarray(X), config=config_of(), positions_BT=jnp.arange(T)[None] / 4)
    assert differing(scaled, slow) == {}


def test_llama3_scaling_keeps_high_frequencies_and_divides_low_ones() -> None:
    plain = rope_frequencies(small_config("llama", head_size=16))
    sizes: dict[str, Any] = {"rope_factor": 8.0, "rope_original_tokens": 256}
    scaled = rope_frequencies(small_config("llama", head_size=16, rope_scaling="llama3", **sizes))
    turns = 256 * plain / (2 * np.pi)
    share = (turns - 1) / 3
    mixed = (1 - share) * plain / 8 + share * plain
    expected = np.where(turns > 4, plain, np.where(turns < 1, plain / 8, mixed))
    assert {"kept": (turns > 4).sum(), "mixed": ((turns <= 4) & (turns >= 1)).sum()} == {"kept": 3, "mixed": 1}
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_a_part_of_each_head_is_rotated_and_the_rest_is_kept() -> None:
    part = rotate(jnp.asarray(X), config=config_of(rope_head_size=4))
    alone = rotate(jnp.asarray(X[..., :4]), config=small_config("llama", head_size=4))
    assert bool((part[..., 4:] == X[..., 4:]).all())
    assert differing(part[..., :4], alone) == {}
