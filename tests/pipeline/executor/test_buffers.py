"""Buffers of the executor's loop: read, written and added to in place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.pipeline.executor.buffers import add, read, write
from trellax.programs.hlo import HloModule

CHUNKS, LAYERS, TOKENS, ROWS, COLUMNS = 2, 8, 16, 64, 96


def sum_in_loop(x_LTR: jax.Array, y_LTC: jax.Array, chunk: Any) -> jax.Array:
    """Sum 16 products, two for each layer of a chunk, as backwards do: [C, k, R, C]."""

    def one(turn: jax.Array, sums: jax.Array) -> jax.Array:
        layer = turn % LAYERS
        return add(sums, x_LTR[layer].T @ y_LTC[layer], (chunk, layer))

    return jax.lax.fori_loop(0, 2 * LAYERS, one, jnp.zeros((CHUNKS, LAYERS, ROWS, COLUMNS)))


def inputs() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (LAYERS, TOKENS, ROWS)), jax.random.normal(keys[1], (LAYERS, TOKENS, COLUMNS))


@pytest.mark.parametrize("chunk", [0, 1])
def test_gradients_are_added_at_their_place(chunk: int) -> None:
    x_LTR, y_LTC = inputs()
    sums = np.asarray(jax.jit(sum_in_loop)(x_LTR, y_LTC, jnp.int32(chunk)))
    np.testing.assert_allclose(sums[chunk], 2 * jnp.einsum("ltr,ltc->lrc", x_LTR, y_LTC), rtol=1e-5, atol=1e-5)
    assert not sums[1 - chunk].any()


def test_a_sum_is_made_in_place() -> None:
    """The slice of the sums is read where it is written: no operation of the loop writes out the slice alone."""
    text: Any = jax.jit(sum_in_loop).lower(*inputs(), jnp.int32(1)).compile().as_text()
    program = HloModule.parse(text)
    kinds = [
        {
            inner.opcode
            for name in i.called().get("calls", ())
            for inner in program.computations[name].instructions.values()
        }
        for computation, i in program.instructions()
        if i.opcode == "fusion" and computation.name in program.in_loops()
    ]
    adding = [kind for kind in kinds if "dynamic-update-slice" in kind]
    assert [{"dynamic-slice", "add"} <= kind for kind in adding] == [True]


def test_what_is_written_is_read() -> None:
    buffers = {"a": jnp.zeros((3, 4, 5)), "b": jnp.zeros((3, 4), jnp.int32)}
    values = {"a": jnp.arange(5.0), "b": jnp.int32(7)}
    written = jax.jit(lambda slot: write(buffers, values, slot, 2))(jnp.int32(1))
    assert jax.tree.map(np.array_equal, read(written, 1, 2), values) == {"a": True, "b": True}
    assert not any(np.asarray(leaf)[[0, 2]].any() for leaf in jax.tree.leaves(written))
