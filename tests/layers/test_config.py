"""A model config derives what was left out and refuses sizes that contradict each other."""

from collections.abc import Callable
from typing import Any

import pytest
from trellax.layers import ModelConfig
from trellax.meshes import ModelError

SIZES: dict[str, Any] = {"vocab_size": 256, "num_layers": 2, "hidden_size": 64, "num_heads": 4}

MISTAKES: dict[str, dict[str, Any]] = {
    "no_layers": {"num_layers": 0},
    "negative_vocab": {"vocab_size": -1},
    "negative_ffn": {"ffn_size": -4},
    "heads_do_not_divide_hidden": {"num_heads": 5},
    "kv_heads_do_not_divide_heads": {"num_kv_heads": 3},
    "more_kv_heads_than_heads": {"num_kv_heads": 8},
    "odd_head_with_rotary": {"head_size": 15, "positions": "rotary"},
    "negative_window": {"attention_window": -1},
    "rope_factor_without_scaling": {"positions": "rotary", "rope_factor": 8.0},
    "rope_factor_of_zero": {"positions": "rotary", "rope_scaling": "linear", "rope_factor": 0.0},
    "rope_dynamic_and_long": {"positions": "rotary", "rope_scaling": "dynamic", "rope_factor": 2.0}
    | {"max_tokens": 128, "rope_original_tokens": 64},
    "rope_scaling_of_learned_positions": {"rope_scaling": "linear", "rope_factor": 2.0},
    "llama3_without_original_tokens": {"positions": "rotary", "rope_scaling": "llama3", "rope_factor": 8.0},
    "llama3_with_factors_crossed": {"positions": "rotary", "rope_scaling": "llama3", "rope_factor": 8.0}
    | {"rope_original_tokens": 8192, "rope_low_frequency_factor": 4.0, "rope_high_frequency_factor": 1.0},
    "rope_theta_of_learned_positions": {"rope_theta": 500_000.0},
    "no_norm_epsilon": {"norm_epsilon": 0.0},
    "unknown_mlp": {"mlp": "silu"},
    "mistyped_norm": {"norm": "rmsnrom"},
    "dtype_that_is_no_text": {"dtype": float},
    "fraction_for_a_whole_number": {"num_layers": 2.5},
    "text_for_a_whole_number": {"hidden_size": "64"},
    "truth_for_a_whole_number": {"num_kv_heads": True},
    "text_for_a_number": {"rope_theta": "1e4"},
    "no_value_for_a_number": {"norm_epsilon": None},
}


def make(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SIZES | changes))


@pytest.mark.parametrize("name", MISTAKES)
def test_contradiction_is_refused_with_its_numbers(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ModelError) as caught:
        make(**MISTAKES[name])
    golden(f"errors/layers/model_{name}.txt", str(caught.value))


def test_sizes_left_out_are_derived() -> None:
    config = make()
    assert (config.num_kv_heads, config.head_size, config.ffn_size) == (4, 16, 256)


@pytest.mark.parametrize(("hidden_size", "ffn_size"), [(64, 192), (768, 2048), (4096, 10944)])
def test_swiglu_is_two_thirds_as_wide_rounded_up(hidden_size: int, ffn_size: int) -> None:
    assert make(hidden_size=hidden_size, mlp="swiglu").ffn_size == ffn_size


def test_given_sizes_are_kept() -> None:
    config = make(num_kv_heads=2, head_size=32, ffn_size=100)
    assert (config.num_kv_heads, config.head_size, config.ffn_size) == (2, 32, 100)
    assert (config.query_size, config.kv_size) == (128, 64)


def test_head_size_given_frees_hidden_from_the_heads() -> None:
    assert make(num_heads=5, head_size=16).query_size == 80


def test_rope_theta_may_be_a_whole_number() -> None:
    assert make(positions="rotary", rope_theta=500_000).rope_theta == 500_000
