"""Attention in blocks of queries equals attention as a whole, and holds the scores of one block at most."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers.attention.blockwise import attend_blockwise

from ..sharded import differing, normal

B, N, H = 2, 4, 16


def whole(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int) -> jax.Array:
    seen = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=seen)


def inputs(num_tokens: int, kv_heads: int) -> list[jax.Array]:
    return [jnp.asarray(normal(B, num_tokens, n, H, seed=s)) for s, n in enumerate((N, kv_heads, kv_heads, N))]


def run(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, grad: jax.Array) -> Any:
    y, vjp = jax.vjp(attend, q, k, v)
    return y, vjp(grad)


# One block; four, the last of 8 queries; four of 75. Windows end within a block, span two, and see all.
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("num_tokens", "window"), [(40, 0), (200, 0), (200, 3), (300, 100), (300, 500)])
def test_outputs_and_gradients_equal_those_of_attention_as_a_whole(num_tokens: int, window: int, kv_heads: int) -> None:
    arrays = inputs(num_tokens, kv_heads)
    expected = jax.jit(partial(run, partial(whole, window=window)))(*arrays)
    actual = jax.jit(partial(run, lambda q, k, v: attend_blockwise(q, k, v, window)))(*arrays)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}


def capped(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, cap: float) -> jax.Array:
    k, v = (jnp.repeat(leaf, q.shape[2] // leaf.shape[2], axis=2) for leaf in (k, v))
    scores = cap * jnp.tanh(jnp.einsum("btnh,bsnh->bnts", q, k) / H**0.5 / cap)
    behind = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None]
    seen = ((behind >= 0) & (behind < (window or q.shape[1])))[None, None]
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -jnp.inf)), v)


@pytest.mark.parametrize("is_windowed", [True, False])
def test_caps_and_windows_of_some_layers_change_outputs_and_gradients_alike(is_windowed: bool) -> None:
    arrays = inputs(100, 2)
    expected = jax.jit(partial(run, partial(capped, window=30 if is_windowed else 0, cap=1.5)))(*arrays)

    def ours(flag: jax.Array, *arrays: jax.Array) -> Any:
        return run(lambda q, k, v: attend_blockwise(q, k, v, 30, is_windowed=flag, cap=1.5), *arrays)

    actual = jax.jit(ours)(jnp.asarray(is_windowed), *arrays)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}


def test_bfloat16_is_as_near_to_float32_as_attention_as_a_whole_is() -> None:
    arrays = inputs(200, 2)
    halves = [x.astype(jnp.bfloat16) for x in arrays]
    exact = run(partial(whole, window=0), *(x.astype(jnp.float32) for x in halves))

    def errors(attend: Any) -> list[float]:
        found = jax.tree.leaves(jax.jit(partial(run, attend))(*halves))
        pairs = zip(found, jax.tree.leaves(exact), strict=True)
        return [float(jnp.abs(a.astype(jnp.float32) - b).mean()) for a, b in pairs]

    ours, theirs = errors(lambda q, k, v: attend_blockwise(q, k, v, 0)), errors(partial(whole, window=0))
    # Both round results once and shares once more; our backward, as flash attention's, reads the rounded output too.
    assert all(a < 1.25 * b for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


def test_no_array_holds_all_scores() -> None:
    program = jax.jit(partial(run, lambda q, k, v: attend_blockwise(q, k, v, 0))).lower(*inputs(256, 2)).as_text()
    sizes = [np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+f32)>", program)]
    # The largest block: 64 queries of every head with all 256 keys.
    assert max(sizes) == B * N * 64 * 256
