"""Choices that do not go together are refused with what was asked; layers that differ know which they are."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import Block, ModelConfig, flops_per_token
from trellax.layers.options.by_layer import attention_of_layer
from trellax.layers.options.check_config import windows_of_layers
from trellax.layers.rope.frequencies import rope_frequencies
from trellax.meshes import ModelError

from ..sharded import small_config

MISTAKES: dict[str, dict[str, Any]] = {
    "no_residuals": {"residual_scale": 0.0},
    "negative_cap": {"logit_softcap": -1.0},
    "unknown_kind": {"attention_pattern": ("full", "widnow")},
    "window_without_use": {"attention_pattern": ("full", "unrotated"), "attention_window": 4},
    "no_window": {"attention_pattern": ("full", "window")},
    "unrotated_of_learned": {"attention_pattern": ("full", "unrotated"), "positions": "learned"},
    "window_theta_without_windows": {"window_rope_theta": 100.0},
    "experts_of_geglu": {"mlp": "geglu", "num_experts": 4, "experts_per_token": 2},
    "cudnn_with_a_cap": {"attention": "cudnn", "dtype": "bfloat16", "attention_softcap": 50.0},
    "latents_by_layer": {"latent_size": 8, "rope_head_size": 2, "attention_pattern": ("full",)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_contradiction_is_refused_with_its_numbers(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ModelError) as caught:
        small_config("llama", **MISTAKES[name])
    golden(f"errors/layers/option_{name}.txt", str(caught.value))


def pattern_of(*kinds: str, **more: Any) -> ModelConfig:
    return small_config("llama", attention_pattern=kinds, attention_window=4, num_layers=5, **more)


def test_pattern_is_repeated_over_the_layers() -> None:
    assert windows_of_layers(pattern_of("window", "window", "full")) == (4, 4, 0, 4, 4)
    assert windows_of_layers(small_config("qwen")) == (5, 5)


def test_each_layer_has_the_frequencies_of_its_kind() -> None:
    config = pattern_of("window", "full", "unrotated", rope_scaling="linear", rope_factor=8.0, window_rope_theta=100.0)
    local = rope_frequencies(small_config("llama", rope_theta=100.0))
    expected = [local, rope_frequencies(config), np.zeros_like(local), local, rope_frequencies(config)]
    found = [attention_of_layer(config, layer) for layer in range(5)]
    assert all(np.array_equal(own.frequencies, one) for own, one in zip(found, expected, strict=True))
    assert [bool(own.is_windowed) for own in found] == [True, False, False, True, False]


def test_a_layer_without_its_number_is_refused() -> None:
    build = lambda: Block(pattern_of("window", "full"), rngs=nnx.Rngs(0))(jnp.ones((1, 4, 32)))  # noqa: E731
    with pytest.raises(ModelError, match="was run without its number"):
        nnx.eval_shape(build)


def test_flops_of_scores_are_those_of_each_window() -> None:
    whole, windowed = (flops_per_token(config, num_tokens=16).scores for config in (MIXED, ALL_WINDOWS))
    full = flops_per_token(small_config("llama", num_layers=4), num_tokens=16).scores
    assert 2 * whole == full + windowed


MIXED = small_config("llama", num_layers=4, attention_pattern=("window", "full"), attention_window=4)
ALL_WINDOWS = small_config("llama", num_layers=4, attention_window=4)
