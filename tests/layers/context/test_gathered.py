"""Attention over context ranks equals attention of whole sequences, by the plain kernel and by a stand-in of cuDNN's.

cuDNN runs on GPUs alone. The stand-in has its contract: the backward reads the output and the softmax's sums among its
residuals, and computes shares with these, whatever keys they are over. `tests/programs/test_cuda.py` compiles the real.
"""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.layers.attention.blockwise import (
    Limits,
    QueryTile,
    attend_blockwise,
    attend_tile,
    heads_first,
    tile_grads,
    tokens_first,
)
from trellax.layers.context import fused_tiles
from trellax.layers.context.fused_tiles import FusedKernel
from trellax.layers.context.gathered import How, attend_gathered
from trellax.layers.context.places import order_chunks
from trellax.layers.context.plain_tiles import PlainKernel
from trellax.layers.context.tiles import Kernel

from ..sharded import differing, mesh_of, normal

B, N, K, H = 2, 4, 2, 16


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def stand_in(q: jax.Array, k: jax.Array, v: jax.Array, window: int, causal: bool) -> jax.Array:
    return run_stand_in(q, k, v, window, causal)[0]


def mask_of(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    seen = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool)) if causal else jnp.ones((q.shape[1], k.shape[1]), bool)
    return seen[None, None, None]


def parts(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    return heads_first(q, k.shape[2]), jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)


def run_stand_in(q: jax.Array, k: jax.Array, v: jax.Array, window: int, causal: bool) -> tuple[jax.Array, Any]:
    assert not window
    q_, k_, v_ = parts(q, k, v)
    tile = attend_tile(q_, k_, v_, mask_of(q, k, causal))
    y, sums = tokens_first(tile.mixed), tile.sums.reshape(q.shape[0], N, -1)
    return y, (q, k, v, jnp.zeros((0,), q.dtype), sums, y)


def stand_in_back(window: int, causal: bool, saved: Any, grad: jax.Array) -> Any:
    q, k, v, _, sums, y = saved
    q_, k_, v_ = parts(q, k, v)
    delta = jnp.swapaxes((grad * y).sum(-1), 1, 2).reshape(q_.shape[:-1])
    of = QueryTile(q_, heads_first(grad, K), delta, sums.reshape(q_.shape[:-1]))
    d_q, d_k, d_v = tile_grads(of, k_, v_, mask_of(q, k, causal))
    return tokens_first(d_q) * H**-0.5, jnp.swapaxes(d_k, 1, 2) * H**-0.5, jnp.swapaxes(d_v, 1, 2)


stand_in.defvjp(run_stand_in, stand_in_back)


@pytest.fixture(autouse=True)
def _has_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    fused: Any = lambda q, k, v, *, window, causal: stand_in(q, k, v, window, causal)  # noqa: E731
    monkeypatch.setattr(fused_tiles, "attend_fused", fused)


def whole(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, window: int) -> jax.Array:
    """Attention by the definition: all scores and one mask."""
    place = jnp.arange(q.shape[1])
    behind = place[:, None] - place[None]
    seen = ((behind >= 0) & (behind < window) if window else behind >= 0)[None]
    seen = seen if segments is None else seen & (segments[:, :, None] == segments[:, None])
    return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])


def run(attend: Any, grad: jax.Array, *given: Any) -> Any:
    (*qkv, segments) = given
    y, vjp = jax.vjp(lambda *qkv: attend(*qkv, segments), *qkv)
    return y, vjp(grad)


def inputs(num_tokens: int, packed: bool) -> Any:
    q, k, v, grad = (normal(B, num_tokens, n, H, seed=s) for s, n in enumerate((N, K, K, N)))
    starts = np.random.default_rng(5).uniform(size=(B, num_tokens)) < 0.1
    return grad, q, k, v, starts.cumsum(1).astype(np.int32) if packed else None


def on_ranks(arrays: Any, num_ranks: int, how: How) -> Any:
    """Return the results of a context mesh in the order of the sequence."""
    ordered = jax.tree.map(lambda leaf: order_chunks(leaf, num_ranks=num_ranks, dim=1), arrays)
    attend = jax.shard_map(
        lambda q, k, v, documents: attend_gathered(q, k, v, Limits(documents), how),
        mesh=mesh_of(f"context={num_ranks}"),
        in_specs=P(None, "context"),
        out_specs=P(None, "context"),
    )
    found = jax.jit(partial(run, attend))(*ordered)
    back = np.argsort(order_chunks(np.arange(arrays[0].shape[1]), num_ranks=num_ranks))
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:, back], found)


CASES = [
    (2, 16, 0, False, "plain"),
    (2, 16, 0, False, "fused"),
    (4, 64, 0, False, "fused"),
    (4, 64, 0, True, "plain"),
    # Chunks of 100, in blocks of 64 and 36 queries.
    (2, 400, 130, True, "plain"),
    *((4, 64, window, packed, "plain") for window in (1, 8, 9, 17, 40) for packed in (False, True)),
]


@pytest.mark.parametrize(("num_ranks", "num_tokens", "window", "packed", "kernel"), CASES)
def test_outputs_and_gradients_equal_those_of_whole_sequences(
    num_ranks: int, num_tokens: int, window: int, packed: bool, kernel: str
) -> None:
    kernels: dict[str, Kernel] = {"plain": PlainKernel(), "fused": FusedKernel()}
    arrays = inputs(num_tokens, packed)
    expected = jax.jit(partial(run, partial(whole, window=window)))(*arrays)
    actual = on_ranks(arrays, num_ranks, How(window=window, axes=("context",), kernel=kernels[kernel]))
    assert differing(actual, jax.device_get(expected)) == {}


@pytest.mark.parametrize("kernel", [FusedKernel(), PlainKernel()], ids=["fused", "plain"])
def test_kept_keys_give_the_gradients_of_those_gathered_again(kernel: Kernel) -> None:
    arrays = inputs(64, packed=isinstance(kernel, PlainKernel))
    own = How(window=0, axes=("context",), kernel=kernel)
    again, kept = (on_ranks(arrays, 4, how) for how in (own, own._replace(kept="all")))
    jax.tree.map(np.testing.assert_array_equal, kept, again)


@pytest.mark.parametrize("window", [0, 7])
def test_documents_of_one_device_see_themselves_alone(window: int) -> None:
    arrays = inputs(200, packed=True)
    expected = jax.jit(partial(run, partial(whole, window=window)))(*arrays)
    attend: Any = lambda q, k, v, segments: attend_blockwise(q, k, v, window, segments)  # noqa: E731
    assert differing(jax.device_get(jax.jit(partial(run, attend))(*arrays)), jax.device_get(expected)) == {}


def test_no_array_holds_the_scores_of_a_pair_of_chunks() -> None:
    how = How(window=0, axes=("context",), kernel=PlainKernel())
    attend = jax.shard_map(
        lambda q, k, v, documents: attend_gathered(q, k, v, Limits(documents), how),
        mesh=mesh_of("context=2"),
        in_specs=P(None, "context"),
        out_specs=P(None, "context"),
    )
    program = jax.jit(partial(run, attend)).lower(*inputs(1024, packed=True)).as_text()
    sizes = [np.prod([int(n) for n in dims.split("x")[:-1]]) for dims in re.findall(r"tensor<((?:\d+x)+f32)>", program)]
    # Chunks of 256: 64 queries of both chunks of each sequence, of every head, with all keys of their chunk.
    assert max(sizes) == 2 * B * N * 64 * 256
