"""Attention with sinks is a softmax with one key more, whose value is 0: in plain XLA and around a fused kernel."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from trellax.layers.attention import flash
from trellax.layers.attention.blockwise import (
    Limits,
    QueryTile,
    attend_blockwise,
    attend_tile,
    heads_first,
    seen_keys,
    tile_grads,
    tokens_first,
)

from ..sharded import differing, normal

B, T, N, K, H, WINDOW = 2, 70, 4, 2, 8, 30


def whole(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array, *, window: int) -> jax.Array:
    """The definition: all scores, and one of each head beside them."""
    k, v = (jnp.repeat(leaf, N // K, axis=2) for leaf in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * H**-0.5
    scores = jnp.where(seen_keys((T, T), 0, window, None)[:, 0], scores, -jnp.inf)
    beside = jnp.broadcast_to(sinks[None, :, None, None], (B, N, T, 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)[..., :T]
    return jnp.einsum("bnts,bsnh->btnh", shares, v)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def stand_in(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    """A kernel with cuDNN's contract: its backward computes shares from the sums, and their mean from the output."""
    return stand_in_forward(q, k, v, window)[0]


def parts(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    return heads_first(q, K), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def stand_in_forward(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> tuple[jax.Array, Any]:
    q_BKGTH, k_BKTH, v_BKTH = parts(q, k, v)
    tile = attend_tile(q_BKGTH, k_BKTH, v_BKTH, seen_keys((T, T), 0, window, None))
    y = tokens_first(tile.mixed)
    return y, (q, k, v, jnp.zeros((0,), q.dtype), tile.sums.reshape(B, N, T), y)


def stand_in_backward(window: int, saved: Any, grad: jax.Array) -> Any:
    q, k, v, _, sums, y = saved
    q_BKGTH, k_BKTH, v_BKTH = parts(q, k, v)
    shape = q_BKGTH.shape[:-1]
    mean = jnp.swapaxes((grad * y).sum(-1), 1, 2).reshape(shape)
    of = QueryTile(q_BKGTH, heads_first(grad, K), mean, sums.reshape(shape))
    d_q, d_k, d_v = tile_grads(of, k_BKTH, v_BKTH, seen_keys((T, T), 0, window, None))
    return tokens_first(d_q) * H**-0.5, jnp.swapaxes(d_k, 1, 2) * H**-0.5, jnp.swapaxes(d_v, 1, 2)


stand_in.defvjp(stand_in_forward, stand_in_backward)


@pytest.mark.parametrize(
    ("kernel", "is_windowed"),
    [
        ("xla", True),
        ("cudnn", False),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("xla", False), ("cudnn", True))),
    ],
)
def test_outputs_and_all_gradients_are_those_of_the_definition(
    kernel: str, is_windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "attend_fused", lambda q, k, v, *, window: stand_in(q, k, v, window))
    q, k, v, grad = (jnp.asarray(normal(B, T, n, H, seed=s)) for s, n in enumerate((N, K, K, N)))
    # A sink that takes nothing, two that matter, and one that takes nearly all.
    sinks = jnp.asarray([-80.0, 0.5, 3.0, 60.0], jnp.float32)

    def ours(flag: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        if kernel == "cudnn":
            return flash._attend_flash(q, k, v, Limits(is_windowed=flag, sinks=sinks), WINDOW)
        return attend_blockwise(q, k, v, WINDOW, is_windowed=flag, sinks_N=sinks)

    def run(attend: Any, *given: jax.Array) -> Any:
        y, vjp = jax.vjp(attend, *given)
        return y, vjp(grad)

    actual = jax.jit(lambda flag, *given: run(partial(ours, flag), *given))(jnp.asarray(is_windowed), q, k, v, sinks)
    expected = jax.jit(partial(run, partial(whole, window=WINDOW if is_windowed else 0)))(q, k, v, sinks)
    assert differing(jax.device_get(actual), jax.device_get(expected)) == {}
    # Without a gradient too.
    alone = jax.jit(ours)(jnp.asarray(is_windowed), q, k, v, sinks)
    assert differing({"y": jax.device_get(alone)}, {"y": jax.device_get(expected[0])}) == {}
