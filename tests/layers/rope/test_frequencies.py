"""Frequencies of YaRN and LongRoPE are those of the papers; tests/hub compares them with transformers."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import ModelConfig
from trellax.layers.rope.by_length import frequencies_by_length
from trellax.layers.rope.frequencies import rope_frequencies
from trellax.layers.rope.magnitude import rope_magnitude
from trellax.meshes import ModelError

from ..sharded import small_config

YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 40.0, "rope_original_tokens": 4096}
YARN |= {"rope_high_frequency_factor": 32.0}


def yarn(**changes: Any) -> ModelConfig:
    return small_config("llama", **({"head_size": 64} | YARN | changes))


def test_yarn_keeps_pairs_that_turn_often_and_slows_those_that_turn_less_than_once() -> None:
    plain, scaled = rope_frequencies(small_config("llama", head_size=64)), rope_frequencies(yarn())
    turns = 4096 * plain / (2 * np.pi)
    share = scaled / plain
    np.testing.assert_allclose(share[turns > 40], 1, rtol=1e-6)
    np.testing.assert_allclose(share[turns < 0.7], 1 / 40, rtol=1e-6)
    # In between lies a straight ramp over the numbers of pairs, as far as one more pair on either side.
    between = share[(share < 0.999) & (share > 1 / 40 + 1e-3)]
    assert len(between) == 12
    np.testing.assert_allclose(np.diff(between), np.diff(between)[0], rtol=1e-4)


def test_a_ramp_of_one_pair_divides_by_no_zero() -> None:
    config = yarn(rope_low_frequency_factor=1000.0, rope_high_frequency_factor=1000.001, rope_original_tokens=100)
    assert np.isfinite(rope_frequencies(config)).all()


def test_rotated_features_are_longer_under_yarn() -> None:
    assert rope_magnitude(small_config("llama")) == 1
    assert rope_magnitude(yarn()) == 0.1 * math.log(40) + 1
    assert rope_magnitude(yarn(rope_attention_factor=1.5)) == 1.5


LONGROPE: dict[str, Any] = {"rope_scaling": "longrope", "rope_factor": 32.0, "rope_original_tokens": 4096}
LONGROPE |= {"rope_short_factors": (1.0, 1.5), "rope_long_factors": (2.0, 30.0)}


def test_longrope_chooses_by_the_length_of_the_sequence() -> None:
    plain, config = rope_frequencies(small_config("llama")), small_config("llama", **LONGROPE)
    for num_tokens, factors in ((4096, (1.0, 1.5)), (4097, (2.0, 30.0))):
        np.testing.assert_allclose(rope_frequencies(config, num_tokens=num_tokens), plain / factors, rtol=1e-6)
    found = frequencies_by_length(config, jnp.asarray([5000, 4096, 4097]))
    np.testing.assert_allclose(found, plain / np.array([(2.0, 30.0), (1.0, 1.5), (2.0, 30.0)]), rtol=1e-6)
    assert frequencies_by_length(small_config("llama"), 4097) is None
    assert rope_magnitude(config) == math.sqrt(1 + math.log(32) / math.log(4096))
    assert rope_magnitude(small_config("llama", **LONGROPE | {"rope_factor": 1.0})) == 1
    assert rope_magnitude(small_config("llama", **LONGROPE, rope_attention_factor=1.5)) == 1.5


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_long_factors": (2.0,)}, "rope_long_factors has 1 factors.* each of 2 frequencies"),
        ({"rope_short_factors": (0.0, 1.0)}, "rope_short_factors has 2 factors.*above 0"),
        ({"rope_original_tokens": 0}, "rope_original_tokens=0: rope_scaling='longrope'"),
        ({"attention_pattern": ("full",)}, "attention_pattern=.'full',. with rope_scaling='longrope'"),
        ({"rope_mscale_all": 1.0}, "rope_mscale_all=1.0 is for YaRN"),
        ({"rope_scaling": "linear"}, "rope_short_factors=.* is for LongRoPE"),
    ],
)
def test_contradictions_of_longrope_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        small_config("llama", **LONGROPE | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_high_frequency_factor": 4.0}, "=4 is Llama 3's"),
        ({"rope_high_frequency_factor": 0.5}, "0 < 1.0 < 0.5 must hold"),
        ({"rope_original_tokens": 0}, "rope_scaling='yarn' compares wavelengths"),
        ({"rope_attention_factor": -1.0}, "rope_attention_factor=-1.0 is not a finite number of 0 or more"),
        ({"rope_theta": 1.0}, "rope_theta=1.0: YaRN takes its logarithm"),
        ({"rope_scaling": "llama3", "rope_mscale_all": 1.0}, "rope_mscale_all=1.0 is for YaRN"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        yarn(**changes)
