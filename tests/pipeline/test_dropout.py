"""Dropout and stochastic depth drop the same on every mesh, with every schedule and number of microbatches."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import Block, ModelConfig
from trellax.layers.dropout import BranchNoise
from trellax.meshes import DEFAULT_RULES, ModelError

from .law import answer_of, beyond, errors_of, pipeline_step, small_model

TOLERANCE = 2e-5
NOISY = replace(small_model(style="llama", attention="gqa"), dropout=0.2, stochastic_depth=0.4)

CASES: list[dict[str, Any]] = [
    {"mesh": "2x2x2", "schedule": "zb-h1", "num_microbatches": 2, "sequence": "on"},
    {"mesh": "1x1x4", "schedule": "1f1b", "num_microbatches": 4, "layers_per_stage": (1, 3, 2, 2)},
    {"mesh": "context=2,tensor=2,pipe=2", "schedule": "1f1b", "num_microbatches": 2},
    {"mesh": "2x4x1", "schedule": "gpipe", "num_microbatches": 1, "remat": "full", "shard": "step"},
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['mesh']}-{case['schedule']}")
def test_a_step_drops_the_same_on_every_mesh(case: dict[str, Any]) -> None:
    given: dict[str, Any] = {"num_sequences": 8, "key": jax.random.key(5)}
    one = pipeline_step(NOISY, mesh="1x1x1", schedule="1f1b", num_microbatches=1, **given)
    expected, actual = answer_of(one), answer_of(pipeline_step(NOISY, **case, **given))
    assert beyond(errors_of(actual, expected), tolerance=TOLERANCE) == {}
    still = pipeline_step(NOISY, mesh="1x1x1", schedule="1f1b", num_microbatches=1, num_sequences=8)
    assert abs(answer_of(still).loss - expected.loss) > 1e-3 * expected.loss


def noise_of(*, dropout: float, left_out: float, num_sequences: int) -> BranchNoise:
    keys = jax.random.split(jax.random.key(1), num_sequences)
    return BranchNoise(keys=keys, dropout=dropout, left_out=jnp.float32(left_out))


@pytest.mark.slow
def test_share_of_numbers_and_of_branches_is_that_of_the_rates() -> None:
    noise = noise_of(dropout=0.25, left_out=0.5, num_sequences=400)
    drop = jax.jit(lambda noise, y: noise.drop(y, branch=0, rules=DEFAULT_RULES))
    y = np.asarray(drop(noise, jnp.ones((400, 8, 8))))
    is_whole = (y == 0).all((1, 2))
    # Means of 400 and of some 12,800 draws: four standard deviations.
    assert is_whole.mean() == pytest.approx(0.5, abs=0.1)
    assert (y[~is_whole] == 0).mean() == pytest.approx(0.25, abs=0.016)
    assert set(np.unique(y)) == {0.0, np.float32(2 / 0.75)}


@pytest.mark.slow
def test_a_branch_that_is_left_out_leaves_x_as_it_is() -> None:
    block = Block(ModelConfig(vocab_size=16, num_layers=1, hidden_size=8, num_heads=2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (64, 4, 8))
    y = np.asarray(block.run(x, noise=noise_of(dropout=0.0, left_out=0.5, num_sequences=64))[0])
    is_same = (y == np.asarray(x)).all((1, 2))
    # Both branches of a sequence are left out a quarter of the time: 16 of 64, give or take four deviations.
    assert 3 <= is_same.sum() <= 30


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dropout": 1.0}, "dropout=1.0 is no share below 1"),
        ({"stochastic_depth": 0.1, "block": "a:B"}, "stochastic_depth=0.1 with block='a:B'"),
    ],
    ids=str,
)
def test_rates_that_do_not_fit_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match):
        replace(small_model(), **change)
