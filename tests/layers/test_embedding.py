"""A lookup in a split table is a lookup in the whole one, wherever the token's row lives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trellax.layers import Embedding
from trellax.layers.embedding import lookup

from .sharded import STYLES, Probe, collectives, differing, mesh_of, normal, place, small_config, text_of

NUM_ROWS, SIZE = 32, 8
TABLE = normal(NUM_ROWS, SIZE)
TOKENS = {
    "borders_of_every_slice": np.array([[0, 3, 4, 7, 8, 11, 12, 15], [16, 19, 20, 23, 24, 27, 28, 31]]),
    "one_token_repeated": np.full((2, 8), 17),
    "all_in_one_slice": np.array([[4, 5, 6, 7, 4, 5, 6, 7], [7, 6, 5, 4, 7, 6, 5, 4]]),
    "random": np.random.default_rng(0).integers(0, NUM_ROWS, (2, 8)),
}
GRAD = normal(2, 8, SIZE, seed=3)


def plain(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows and the gradient of the table, by numpy."""
    grad = np.zeros_like(TABLE)
    np.add.at(grad, tokens, GRAD)
    return {"rows": TABLE[tokens], "grad": grad}


def rows_and_grad(table: jax.Array, tokens: jax.Array, grad: jax.Array) -> dict[str, jax.Array]:
    rows, vjp = jax.vjp(lambda table: lookup(table, tokens), table)
    return {"rows": rows, "grad": vjp(grad)[0]}


@pytest.mark.parametrize("mesh", ["tensor=1", "tensor=8", "data=2,tensor=4"])
@pytest.mark.parametrize("name", TOKENS)
def test_split_lookup_and_its_gradient_match_a_plain_one(name: str, mesh: str) -> None:
    devices, tokens = mesh_of(mesh), TOKENS[name]
    with jax.set_mesh(devices):
        table = place(TABLE, ("vocab", "embed"), mesh=devices)
        actual = jax.jit(rows_and_grad)(table, place(tokens, ("batch", None), mesh=devices), GRAD)
    assert differing(jax.device_get(actual), plain(tokens)) == {}


@pytest.mark.parametrize("mesh", ["pipe=2,tensor=4", "pipe=2,data=2,tensor=2"])
@pytest.mark.parametrize("name", TOKENS)
def test_lookup_works_where_pipe_and_data_are_manual(name: str, mesh: str) -> None:
    devices, tokens = mesh_of(mesh), TOKENS[name]

    def region(table: jax.Array, tokens: jax.Array, grad: jax.Array) -> dict[str, jax.Array]:
        table, grad = jax.lax.pcast(table, ("pipe", "data"), to="varying"), jax.lax.pcast(grad, "pipe", to="varying")
        out = rows_and_grad(table, tokens, grad)
        return {"rows": jax.lax.pmean(out["rows"], "pipe"), "grad": jax.lax.psum(out["grad"], ("pipe", "data")) / 2}

    split: Any = {"in_specs": (P(), P("data"), P("data")), "out_specs": {"rows": P("data"), "grad": P()}}
    run = jax.shard_map(region, mesh=devices, axis_names={"pipe", "data"}, **split)
    actual = jax.jit(run)(place(TABLE, ("vocab", "embed"), mesh=devices), jnp.asarray(tokens), GRAD)
    assert differing(jax.device_get(actual), plain(tokens)) == {}


def test_lookup_costs_one_all_reduce_of_the_rows_and_never_gathers_the_table() -> None:
    embed = Probe.of(lambda: Embedding(small_config(), rngs=nnx.Rngs(0)))
    found = collectives(embed.program(TOKENS["random"], mesh=mesh_of("tensor=4")))
    assert [(one.kind, one.shape) for one in found] == [("all-reduce", (2, 8, 32))]


def test_gradient_of_a_lookup_is_summed_over_data_and_nothing_is_gathered() -> None:
    devices = mesh_of("data=2,tensor=4")
    with jax.set_mesh(devices):
        table = place(TABLE, ("vocab", "embed"), mesh=devices)
        split = [place(leaf, ("batch", *[None] * (leaf.ndim - 1)), mesh=devices) for leaf in (TOKENS["random"], GRAD)]
        step = jax.jit(rows_and_grad).lower(table, *split).compile()
    found = [(one.kind, one.shape) for one in collectives(text_of(step))]
    assert found == [("all-reduce", (1, 8, SIZE)), ("all-reduce", (NUM_ROWS // 4, SIZE))]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4"])
def test_embedding_on_any_mesh_matches_one_device(style: str, mesh: str) -> None:
    embed = Probe.of(lambda: Embedding(small_config(style), rngs=nnx.Rngs(0)))
    tokens = TOKENS["random"]
    assert differing(embed.answer(tokens, mesh=mesh_of(mesh)), embed.answer(tokens)) == {}


def test_learned_positions_are_added_and_rotary_ones_are_not() -> None:
    tokens = TOKENS["one_token_repeated"]
    learned, rotary = (Probe.of(lambda s=s: Embedding(small_config(s), rngs=nnx.Rngs(0))) for s in ("gpt", "llama"))
    added = learned.answer(tokens)["y"] - learned.params["table"][tokens]
    assert differing(added[0], learned.params["positions"][:8]) == {}
    assert differing(rotary.answer(tokens)["y"], rotary.params["table"][tokens]) == {}


def test_learned_positions_may_be_given() -> None:
    embed = Probe.of(lambda: Embedding(small_config("gpt"), rngs=nnx.Rngs(0)))
    places = np.array([[3, 1, 9, 0], [15, 15, 2, 7]])
    params, tokens = embed.params, np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    actual = nnx.merge(embed.graph, params)(tokens, positions_BT=jnp.asarray(places))
    assert differing(actual, params["table"][tokens] + params["positions"][places]) == {}
