"""Sampling: filters against sorting in numpy, draws against probabilities, and the same tokens on any mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.serve.sampling import SamplingSettings, _cut, finish_reasons
from trellax.serve.sampling import choose as choose_arrays

from .models import mesh_of

V = 16
LOGITS_BV = np.random.default_rng(0).standard_normal((6, V)).astype(np.float32) * 2


def settings_of(rows: int = 6, **changes: Any) -> SamplingSettings:
    """The same settings for every row."""
    given: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0, "limit": 100, "stops": [-1, -1]}
    types = {"temperature": np.float32, "top_p": np.float32, "seed": np.uint32}
    arrays = {name: np.asarray(value, types.get(name, np.int32)) for name, value in (given | changes).items()}
    return SamplingSettings(**{name: np.broadcast_to(value, (rows, *value.shape)) for name, value in arrays.items()})


def choose(logits: Any, settings: SamplingSettings, *, position_B: Any, axes: tuple[str, ...]) -> jax.Array:
    """The settings of what numpy has."""
    return choose_arrays(jnp.asarray(logits), settings, position_B=jnp.asarray(position_B), axes=axes)


def kept(logits_V: np.ndarray, *, top_k: int, top_p: float) -> set[int]:
    """Which tokens stay, by sorting: the top_k likeliest, then the fewest of those with mass top_p."""
    order = np.argsort(-logits_V, kind="stable")[: top_k or None]
    share = np.exp(logits_V[order].astype(np.float64))
    share /= share.sum()
    return (
        set(order[: int(np.searchsorted(np.cumsum(share), top_p)) + 1].tolist()) if top_p < 1 else set(order.tolist())
    )


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (V + 9, 1.0), (0, 0.3), (0, 0.95), (6, 0.7), (0, 1e-6)]
)
def test_filters_keep_the_tokens_that_sorting_keeps(top_k: int, top_p: float) -> None:
    cut_BV = np.asarray(_cut(jnp.asarray(LOGITS_BV), settings_of(top_k=top_k, top_p=top_p), jnp.ones(6, bool), ()))
    found = [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in cut_BV]
    assert found == [kept(row, top_k=top_k, top_p=top_p) for row in LOGITS_BV]


def test_ties_with_the_last_one_in_stay_in() -> None:
    logits = jnp.asarray([[1.0, 0.0, 1.0, 1.0, -2.0]])
    cut = _cut(logits, settings_of(1, top_k=2), jnp.ones(1, bool), ())
    assert np.isfinite(np.asarray(cut[0])).tolist() == [True, False, True, True, False]


def test_temperature_zero_takes_the_likeliest_whatever_the_filters() -> None:
    tokens = choose(LOGITS_BV, settings_of(temperature=0, top_k=1, top_p=0.1), position_B=np.arange(6), axes=())
    assert tokens.tolist() == LOGITS_BV.argmax(-1).tolist()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 4)])
def test_draws_have_the_probabilities_of_the_softmax(temperature: float, top_k: int) -> None:
    draws, logits_V = 20_000, LOGITS_BV[0]
    one = settings_of(draws, temperature=temperature, top_k=top_k, seed=7)
    tokens = jax.jit(lambda logits, position: choose(logits, one, position_B=position, axes=()))(
        np.broadcast_to(logits_V, (draws, V)), np.arange(draws)
    )
    expected = np.exp(logits_V.astype(np.float64) / temperature)
    expected[~np.isin(np.arange(V), list(kept(logits_V, top_k=top_k, top_p=1.0)))] = 0
    expected /= expected.sum()
    found = np.bincount(np.asarray(tokens), minlength=V) / draws
    # Five standard deviations of a count of 20,000; a tenth of it would be wrong once in a run.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_draws_depend_on_seed_and_position_and_not_on_the_row() -> None:
    logits_BV = np.broadcast_to(LOGITS_BV[0], (6, V))
    same = choose(logits_BV, settings_of(seed=3), position_B=np.full(6, 11), axes=())
    assert len(set(same.tolist())) == 1
    wide = choose(np.broadcast_to(LOGITS_BV[0], (64, V)), settings_of(64, seed=3), position_B=np.arange(64), axes=())
    assert len(set(wide.tolist())) > 4


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 5}, {"top_p": 0.7}])
def test_a_split_vocabulary_chooses_the_same(changes: dict[str, Any]) -> None:
    mesh, settings = mesh_of("tensor=4"), settings_of(**changes)
    split = jax.shard_map(
        lambda logits: choose(logits, settings, position_B=jnp.arange(6), axes=("tensor",)),
        mesh=mesh,
        in_specs=P(None, "tensor"),
        out_specs=P(),
        axis_names=set(mesh.axis_names),
    )
    expected = choose(LOGITS_BV, settings, position_B=np.arange(6), axes=())
    assert jax.jit(split)(LOGITS_BV).tolist() == expected.tolist()


def test_equal_scores_on_several_devices_give_the_first() -> None:
    mesh = mesh_of("tensor=4")
    split = jax.shard_map(
        lambda logits: choose(logits, settings_of(1, temperature=0.0), position_B=jnp.arange(1), axes=("tensor",)),
        mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(), axis_names=set(mesh.axis_names),
    )  # fmt: skip
    assert jax.jit(split)(np.ones((1, V), np.float32)).tolist() == [0]


def test_a_sequence_ends_with_a_stop_token_or_its_length() -> None:
    settings = settings_of(4, stops=[9, -1], limit=8)
    reasons = finish_reasons(jnp.asarray([9, 3, 3, 9]), settings, length_B=jnp.asarray([5, 7, 8, 8]))
    assert reasons.tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize("changes", [{"temperature": 1e-38}, {"top_p": 1e-60}, {"top_p": 1e-40, "top_k": 3}])
def test_numbers_at_the_end_of_their_range_take_the_likeliest(changes: dict[str, Any]) -> None:
    tokens = choose(LOGITS_BV, settings_of(**changes), position_B=np.arange(6), axes=())
    assert tokens.tolist() == LOGITS_BV.argmax(-1).tolist()


def test_a_split_vocabulary_chooses_a_token_of_it_even_where_the_model_overflows() -> None:
    mesh = mesh_of("tensor=4")
    split = jax.shard_map(
        lambda logits: choose(logits, settings_of(temperature=0.0), position_B=jnp.arange(6), axes=("tensor",)),
        mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(), axis_names=set(mesh.axis_names),
    )  # fmt: skip
    assert max(jax.jit(split)(np.full_like(LOGITS_BV, np.nan)).tolist()) < V
