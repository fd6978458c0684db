"""Sampling: filters against sorting in numpy, draws against probabilities, and the same tokens on any mesh."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes.device_axes import block_index
from trellax.serve import Request
from trellax.serve.sampling.choose import _cut, _drop_unlikely, finish_reasons
from trellax.serve.sampling.choose import choose as choose_arrays
from trellax.serve.sampling.logprobs import compute_logprobs
from trellax.serve.sampling.penalties import PromptPart, change_logits, count_tokens, note_prompt
from trellax.serve.sampling.settings import SamplingSettings

from ..models import changed_logits, mesh_of
from ..models import settings_of as settings_of_rows

V = 16
LOGITS_BV = np.random.default_rng(0).standard_normal((6, V)).astype(np.float32) * 2


def settings_of(rows: int = 6, **changes: Any) -> SamplingSettings:
    """The same settings for every row, by default a draw."""
    return settings_of_rows(rows, **({"temperature": 1, "limit": 100} | changes))


def choose(
    logits: Any,
    settings: SamplingSettings,
    *,
    position_B: Any,
    axes: tuple[str, ...],
    seen: Any = None,
    allowed: Any = None,
) -> jax.Array:
    """The tokens, chosen by the settings of what numpy has."""
    seen = jnp.zeros(np.shape(logits), jnp.int32) if seen is None else seen
    allowed = jnp.zeros((np.shape(logits)[0], 1), jnp.uint32) if allowed is None else allowed
    logits, position = jnp.asarray(logits), jnp.asarray(position_B)
    own: dict[str, Any] = {"read_seen": lambda: seen, "read_allowed": lambda: allowed}
    return choose_arrays(logits, settings, position_B=position, axes=axes, **own).token


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


SPLITS = [pytest.param(None, id="whole"), pytest.param("tensor=4", id="split")]


def on_blocks(split: str | None, run: Any, *arrays_BV: np.ndarray) -> Any:
    """Run a function of (axes, arrays) on whole arrays, or on their blocks of the vocabulary."""
    if split is None:
        return jax.jit(lambda *arrays: run((), *arrays))(*arrays_BV)
    mesh = mesh_of(split)
    mapped = jax.shard_map(
        lambda *arrays: run(("tensor",), *arrays),
        mesh=mesh, in_specs=P(None, "tensor"), out_specs=P(None, "tensor"), axis_names=set(mesh.axis_names),
    )  # fmt: skip
    return jax.jit(mapped)(*arrays_BV)


@pytest.mark.parametrize("split", SPLITS)
def test_biases_and_penalties_are_those_of_a_loop_over_tokens(split: str | None) -> None:
    rng = np.random.default_rng(2)
    prompts, answers = rng.integers(0, V, (6, 5)), rng.integers(0, V, (6, 7))
    how = {"repetition_penalty": 1.4, "frequency_penalty": 0.3, "presence_penalty": -0.6}
    biases = ((3, 2.5), (15, -1.0))
    requests = [Request(prompt=tuple(prompt), logit_bias=biases, **how) for prompt in prompts]
    expected = np.stack([changed_logits(*one) for one in zip(LOGITS_BV, requests, answers.tolist(), strict=True)])
    seen = np.zeros((6, V), np.int32)
    for row in range(6):
        seen[row, prompts[row]] = 1
        np.add.at(seen[row], answers[row], 2)
    settings = settings_of(bias_tokens=[3, -1, 15], biases=[2.5, 9.0, -1.0], **how)

    def run(axes: tuple[str, ...], logits: jax.Array, seen: jax.Array) -> jax.Array:
        return change_logits(logits, settings, read_seen=lambda: seen, axes=axes)

    assert np.abs(np.asarray(on_blocks(split, run, LOGITS_BV, seen)) - expected).max() <= 1e-6


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_are_counted_once_for_the_prompt_and_each_time_in_the_answer(split: str | None) -> None:
    garbage = np.full((3, V), 9, np.int32)

    def run(axes: tuple[str, ...], seen: jax.Array) -> jax.Array:
        parts = [([5, 5, 1], True), ([1, 15, -1], False)]
        seen = seen[None]
        for tokens, is_first in parts:
            part = PromptPart(slot=jnp.asarray([1]), tokens=jnp.asarray([tokens]), is_first=jnp.asarray([is_first]))
            seen = note_prompt(seen, part, axes=axes)
        for token in (5, 15, 15):
            token_B, is_counted_B = jnp.asarray([token, token]), jnp.asarray([True, False])
            seen = count_tokens(seen, token_B, row=jnp.int32(1), is_counted_B=is_counted_B, axes=axes)
        return seen[0]

    expected = garbage.copy()
    expected[1] = 0
    expected[1, [5, 1, 15]] = [3, 1, 5]
    assert np.asarray(on_blocks(split, run, garbage)).tolist() == expected.tolist()


@pytest.mark.parametrize("min_p", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("split", SPLITS)
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(split: str | None, min_p: float) -> None:
    kept = on_blocks(split, lambda axes, x: _drop_unlikely(x, settings_of(min_p=min_p), axes), LOGITS_BV)
    share = np.exp(LOGITS_BV.astype(np.float64))
    expected = share >= min_p * share.max(-1, keepdims=True)
    assert np.isfinite(np.asarray(kept)).tolist() == expected.tolist()


def test_rows_without_settings_keep_their_logits_to_the_bit() -> None:
    settings = settings_of(repetition_penalty=1.3, bias_tokens=[2, 3], biases=[1, 1])
    for name, value in (("repetition_penalty", 1), ("bias_tokens", -1)):
        changed = np.array(getattr(settings, name))
        changed[2] = value
        settings = replace(settings, **{name: changed})
    seen = jnp.ones((6, V), jnp.int32)
    changed = change_logits(jnp.asarray(LOGITS_BV), settings, read_seen=lambda: seen, axes=())
    assert (np.asarray(changed) == LOGITS_BV).all(-1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("split", SPLITS)
def test_log_probabilities_of_chosen_and_likeliest_tokens(split: str | None) -> None:
    token_B = jnp.asarray([0, 3, 5, 15, 8, 4])

    def run(axes: tuple[str, ...], logits: jax.Array) -> jax.Array:
        found = compute_logprobs(logits, token_B, axes=axes)
        columns = [found.chosen[:, None], found.top_tokens.astype(jnp.float32), found.top]
        # Every device has all of them; the test takes a quarter from each.
        whole = jnp.concatenate(columns, axis=1)[:, :32]
        size = whole.shape[1] // (4 if axes else 1)
        return jax.lax.dynamic_slice_in_dim(whole, block_index(axes) * size, size, axis=1)

    found = np.asarray(on_blocks(split, run, LOGITS_BV))
    expected = LOGITS_BV - np.log(np.exp(LOGITS_BV.astype(np.float64)).sum(-1, keepdims=True))
    order = np.argsort(-expected, axis=-1)
    assert found[:, 1:17].astype(int).tolist() == order.tolist()
    assert np.abs(found[:, 0] - expected[np.arange(6), np.asarray(token_B)]).max() <= 1e-5
    assert np.abs(found[:, 17:] - np.take_along_axis(expected, order, axis=-1)[:, :15]).max() <= 1e-5
