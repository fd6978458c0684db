"""Padding of a vocabulary has no part in any result: not in rows, losses, scores, gradients, or choices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.layers.embedding import lookup
from trellax.layers.options.logits import LogitShape
from trellax.layers.projected_loss import projected_cross_entropy, projected_scores
from trellax.layers.vocabulary import resize_tables, stored_words, whole_words_sharding
from trellax.meshes import MeshSpec, abstract_mesh, build_mesh

WORDS, ROWS, B, T, D = 13, 32, 2, 6, 8
RNG = np.random.default_rng(0)
TABLE, X = (RNG.standard_normal(shape).astype(np.float32) for shape in ((WORDS, D), (B, T, D)))
TARGETS = RNG.integers(0, WORDS, (B, T)).astype(np.int32)
WEIGHTS = np.full((B, T), 1 / (B * T), np.float32)
SHAPES = {"plain": LogitShape(words=WORDS), "capped": LogitShape(scale=0.5, cap=2.0, words=WORDS)}


def test_rows_of_the_adapter_of_a_head_are_resized_with_its_table() -> None:
    own = {"table": TABLE, "lora_a": np.ones((D, 2)), "lora_b": np.ones((WORDS, 2)), "lora_m": np.ones(WORDS)}
    found = resize_tables({"embed": {"table": TABLE}, "head": own}, ROWS)
    assert {name: leaf.shape for name, leaf in found["head"].items()} == {
        "table": (ROWS, D),
        "lora_a": (D, 2),
        "lora_b": (ROWS, 2),
        "lora_m": (ROWS,),
    }
    back = resize_tables(found, WORDS)["head"]
    assert all(np.array_equal(back[name], own[name]) for name in own)


def padded(table: Any) -> Any:
    return resize_tables({"table": table}, ROWS)["table"]


def on_four(run: Any) -> Any:
    """Run a function of x and a table on four devices, each with its rows of the table."""
    mesh = build_mesh(MeshSpec(tensor=4), devices=jax.devices()[:4])
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P())
    return jax.jit(mapped)


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_are_those_without_padding(name: str) -> None:
    def loss(x: jax.Array, table: jax.Array) -> jax.Array:
        return projected_cross_entropy(x, table, jnp.asarray(TARGETS), jnp.asarray(WEIGHTS), shape=SHAPES[name])

    expected, wanted = jax.value_and_grad(loss, argnums=(0, 1))(X, TABLE)
    actual, found = jax.value_and_grad(on_four(loss), argnums=(0, 1))(X, padded(TABLE))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-6)
    np.testing.assert_allclose(found[1][:WORDS], wanted[1], atol=1e-6)
    assert not np.asarray(found[1][WORDS:]).any()


def test_padding_is_never_the_likeliest_word_though_all_others_are_negative() -> None:
    x, table = jnp.ones((B, T, D)), -jnp.ones((WORDS, D))

    def score(x: jax.Array, table: jax.Array) -> Any:
        return tuple(projected_scores(x, table, jnp.zeros((B, T), jnp.int32), shape=SHAPES["plain"]))

    logprob, is_best = on_four(score)(x, padded(table))
    np.testing.assert_allclose(logprob, -np.log(WORDS), rtol=1e-6)
    assert np.asarray(is_best).all()


@pytest.mark.parametrize("token", [WORDS - 1, WORDS, ROWS - 1, ROWS])
def test_ids_of_padding_are_unknown(token: int) -> None:
    ids = jnp.full((B, T), token, jnp.int32)

    def run(x: jax.Array, table: jax.Array) -> Any:
        loss = projected_cross_entropy(x, table, ids, jnp.asarray(WEIGHTS), shape=SHAPES["plain"])
        return loss, lookup(table, ids, num_words=WORDS)

    loss, rows = on_four(run)(X, padded(TABLE))
    is_known = token < WORDS
    assert np.isfinite(loss) == is_known
    assert np.isfinite(rows).all() == is_known
    assert np.isfinite(rows).any() == is_known


@pytest.mark.parametrize(("num_words", "parts"), [(257, 4), (50257, 8), (5, 4), (128, 8), (1, 1)])
def test_rows_are_split_evenly_and_few_are_padding(num_words: int, parts: int) -> None:
    rows = stored_words(num_words, parts=parts)
    assert rows % parts == 0
    assert num_words <= rows < num_words + 8 * parts
    assert (rows == num_words) == (num_words % parts == 0)


def test_features_are_split_where_words_do_not_divide() -> None:
    mesh = abstract_mesh(MeshSpec(data=2, tensor=4, pipe=3))
    held = NamedSharding(mesh, P(("pipe", "tensor"), "data"))
    specs = {shape: whole_words_sharding(held, shape).spec for shape in ((24, 48), (25, 48), (25, 50), (25, 51))}
    assert specs == {
        (24, 48): P(("pipe", "tensor"), "data"),
        (25, 48): P(None, ("data", "pipe", "tensor")),
        (25, 50): P(None, "data"),
        (25, 51): P(None, None),
    }
