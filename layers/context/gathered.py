"""Causal attention of a context rank's queries to the gathered keys and values of all ranks.

    keys, values [B, t, K, H] of each rank   --all-gather over context-->   2c chunks of every sequence
    its two chunks of queries stay           2c + 1 pairs of chunks: two on the diagonal, 2c - 1 below it

    c = 2         keys  0  1  2  3        rank 0 has the queries of chunks 0 and 3, rank 1 those of 1 and 2:
    queries 0           d  .  .  .        each computes 5 pairs, of which the mask hides a half of the two d,
            1           #  d  .  .        and no rank waits for another
            2           #  #  d  .
            3           #  #  #  d

All ranks run one program: a loop over the pairs below the diagonal, in which the rank's number chooses chunks. Results
of pairs are merged by the logarithms of their softmax's sums, as within a kernel (Dao 2023, section 3). The backward
reduce-scatters the gradients of keys and values; it gathers these again, so that a rank keeps those of its own tokens
alone, or all ranks' are kept (`choice.py` has the arithmetic). Read `pairs.py` next, then the two kernels,
`plain_tiles.py` and `fused_tiles.py`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ...meshes.device_axes import mark_varying, varying_axes
from ..attention.blockwise import FLASH_OUTPUTS, Limits
from ..options.by_layer import choose_window
from ..options.sinks import add_sinks, sink_grads
from .pairs import Pair, count_pairs, pair_of
from .tiles import Kernel, Mask, Queries, Tile, merge

GATHERED_KEYS = "gathered_keys"
"""Checkpoint name of gathered keys and values that are kept."""


class How(NamedTuple):
    """The window (0 for none), the context axes, the kernel of a pair of chunks, and whose keys the backward reads."""

    window: int
    axes: tuple[str, ...]
    kernel: Kernel
    kept: Literal["own", "all"] = "own"


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_gathered(q_BtNH: jax.Array, k_BtKH: jax.Array, v_BtKH: jax.Array, limits: Limits, how: How) -> jax.Array:
    """Compute causal attention over whole sequences, of which each device has two chunks.

    q[B, T@context, N, H], k and v[B, T@context, K, H], documents[B, T@context] -> mixed[B, T@context, N, H], for use
    inside `shard_map`. Sends an all-gather of k and v over context; backward a reduce-scatter of their gradients, and
    another all-gather unless all are kept.
    """
    return _forward(q_BtNH, k_BtKH, v_BtKH, limits, how)[0]


class _Saved(NamedTuple):
    """Residuals, of this device's tokens: inputs and output, and the softmax's sums [2, B, N, n], sinks included.

    keys: own keys and values [B, t, K, H], or `_Keys` of all tokens.
    """

    q: jax.Array
    keys: Any
    limits: Limits
    y: jax.Array
    sums: jax.Array


def _forward(
    q_BtNH: jax.Array, k_BtKH: jax.Array, v_BtKH: jax.Array, limits: Limits, how: How
) -> tuple[jax.Array, _Saved]:
    def run(window: int, *given: Any) -> tuple[jax.Array, jax.Array]:
        return _attend_pairs(*given, how=how._replace(window=window))

    # Outside of the branches: devices are not known to take the same.
    keys = _Keys.gather(k_BtKH, v_BtKH, limits.segments, how.axes)
    keys = checkpoint_name(keys, GATHERED_KEYS) if how.kept == "all" else keys
    given = (q_BtNH, k_BtKH, v_BtKH, limits.segments, keys)
    y_BtNH, sums = choose_window(limits.is_windowed, how.window, run, *given)
    if limits.sinks is not None:
        chunks, sums = add_sinks(_cut(y_BtNH), sums, limits.sinks)
        y_BtNH = _back(chunks)
    y_BtNH, sums = checkpoint_name((y_BtNH, sums), FLASH_OUTPUTS)
    return y_BtNH, _Saved(q_BtNH, keys if how.kept == "all" else (k_BtKH, v_BtKH), limits, y_BtNH, sums)


def _attend_pairs(
    q_BtNH: jax.Array,
    k_BtKH: jax.Array,
    v_BtKH: jax.Array,
    segments_Bt: jax.Array | None,
    keys: "_Keys",
    *,
    how: How,
) -> tuple[jax.Array, jax.Array]:
    queries = _cut(q_BtNH)
    on_diagonal = how.kernel.attend(_join(q_BtNH), _join(k_BtKH), _join(v_BtKH), _diagonal(segments_Bt, how))

    def add(number: jax.Array, chunks: Tile) -> Tile:
        pair = keys.pair(number, how)
        new = how.kernel.attend(
            _read(queries, pair.query), keys.take(keys.k, pair), keys.take(keys.v, pair), keys.mask(pair, how)
        )
        both = merge(Tile(*(_read(leaf, pair.query) for leaf in chunks)), new)
        return Tile(*(_write(leaf, own, pair.query) for leaf, own in zip(chunks, both, strict=True)))

    start = _vary(Tile(*map(_apart, on_diagonal)), queries, keys.k, keys.v)
    chunks = jax.lax.fori_loop(0, keys.count(how), add, start)
    return _back(chunks.mixed).astype(q_BtNH.dtype), chunks.sums


def _backward(how: How, saved: _Saved, grad_BtNH: jax.Array) -> tuple[Any, ...]:
    def run(window: int, *given: Any) -> tuple[jax.Array, ...]:
        return _pair_grads(how._replace(window=window), *given)

    if how.kept == "all":
        keys, own = saved.keys, saved.keys.own(how.axes)
    else:
        own = saved.keys
        keys = _Keys.gather(own[0], own[1], saved.limits.segments, how.axes)
    given: Any = (saved._replace(keys=own), grad_BtNH, keys)
    d_q, d_k, d_v, own_d_k, own_d_v = choose_window(saved.limits.is_windowed, how.window, run, *given)

    # Sent in the compute dtype, as every other gradient of an activation.
    def home(of_all: jax.Array, of_own: jax.Array, like: jax.Array) -> jax.Array:
        own = jax.lax.psum_scatter(of_all.astype(like.dtype), how.axes, scatter_dimension=0)
        return _back(own.astype(jnp.float32) + of_own).astype(like.dtype)

    d_sinks_N = None
    if saved.limits.sinks is not None:
        d_sinks_N = sink_grads(_cut(grad_BtNH), _cut(saved.y), saved.sums, saved.limits.sinks)
    d_k_BtKH, d_v_BtKH = home(d_k, own_d_k, keys.k), home(d_v, own_d_v, keys.v)
    return _back(d_q).astype(saved.q.dtype), d_k_BtKH, d_v_BtKH, Limits(sinks=d_sinks_N)


def _pair_grads(how: How, saved: _Saved, grad_BtNH: jax.Array, keys: "_Keys") -> tuple[jax.Array, ...]:
    """Return the gradients of own queries, of the keys and values of all pairs, and of those on the diagonal."""
    own = Queries(_cut(saved.q), _cut(grad_BtNH), _cut(saved.y), saved.sums)
    joined = Queries(*map(_join, (saved.q, grad_BtNH, saved.y)), sums=jnp.concatenate([*saved.sums]))
    diagonal = _diagonal(saved.limits.segments, how)
    own_k, own_v = saved.keys
    on_diagonal = how.kernel.grads(joined, _join(own_k), _join(own_v), diagonal)
    d_q, own_d_k, own_d_v = (_apart(leaf).astype(jnp.float32) for leaf in on_diagonal)

    def add(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        d_q, d_k, d_v = sums
        pair = keys.pair(number, how)
        of = Queries(*(_read(leaf, pair.query) for leaf in own))
        new = how.kernel.grads(of, keys.take(keys.k, pair), keys.take(keys.v, pair), keys.mask(pair, how))
        d_q = _write(d_q, _read(d_q, pair.query) + new[0], pair.query)
        return d_q, keys.add(d_k, new[1], pair), keys.add(d_v, new[2], pair)

    zeros = (jnp.zeros(leaf.shape, jnp.float32) for leaf in (keys.k, keys.v))
    start = _vary((d_q, *zeros), own.q, own.grad, keys.k, keys.v)
    return (*jax.lax.fori_loop(0, keys.count(how), add, start), own_d_k, own_d_v)


attend_gathered.defvjp(_forward, _backward)


class _Keys(NamedTuple):
    """Keys and values of all chunks, by rank and half: [c, 2, B, n, K, H], and their documents [c, 2, B, n]."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None

    @classmethod
    def gather(
        cls, k_BtKH: jax.Array, v_BtKH: jax.Array, segments_Bt: jax.Array | None, axes: tuple[str, ...]
    ) -> "_Keys":
        """Gather them over context."""
        segments = None if segments_Bt is None else jax.lax.all_gather(_cut(segments_Bt), axes)
        return cls(*(jax.lax.all_gather(_cut(leaf), axes) for leaf in (k_BtKH, v_BtKH)), segments=segments)

    def own(self, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
        """Return the keys and values of this device's tokens: [B, t, K, H]."""
        rank = jax.lax.axis_index(axes)
        return _back(_read(self.k, rank)), _back(_read(self.v, rank))

    def count(self, how: How) -> int:
        """Return the number of pairs below the diagonal."""
        return count_pairs(size=self.k.shape[3], window=how.window, axes=how.axes)

    def pair(self, number: jax.Array, how: How) -> Pair:
        """Return one of these pairs."""
        return pair_of(number, size=self.k.shape[3], window=how.window, axes=how.axes)

    def take(self, leaf: jax.Array, pair: Pair) -> jax.Array:
        """Return the chunk of keys or values of a pair: [c, 2, B, n, K, H] -> [B, n, K, H]."""
        return _read(_read(leaf, pair.rank), pair.half)

    def add(self, sums: jax.Array, own: jax.Array, pair: Pair) -> jax.Array:
        """Return sums [c, 2, B, n, K, H] with own [B, n, K, H] added to those of the pair's key chunk."""
        of_rank = _read(sums, pair.rank)
        return _write(sums, _write(of_rank, _read(of_rank, pair.half) + own, pair.half), pair.rank)

    def mask(self, pair: Pair, how: How) -> Mask:
        """Return which keys of a pair its queries see."""
        segments = None
        if self.segments is not None:
            segments = _read(_read(self.segments, pair.own_rank), pair.query), self.take(self.segments, pair)
        ahead = (pair.query_chunk - pair.key_chunk) * self.k.shape[3]
        return Mask(ahead=ahead, window=how.window, segments=segments, is_real=pair.is_real)


def _diagonal(segments_Bt: jax.Array | None, how: How) -> Mask:
    segments = None if segments_Bt is None else (_join(segments_Bt), _join(segments_Bt))
    return Mask(ahead=None, window=how.window, segments=segments)


def _cut(leaf: jax.Array) -> jax.Array:
    """Cut the two chunks of a device apart: [B, t, ...] -> [2, B, n, ...]."""
    return jnp.stack(jnp.split(leaf, 2, axis=1))


def _back(leaf: jax.Array) -> jax.Array:
    """Undo `_cut`."""
    return jnp.concatenate([leaf[0], leaf[1]], axis=1)


def _join(leaf: jax.Array) -> jax.Array:
    """Put the two chunks behind one another in the batch: [B, t, ...] -> [2 B, n, ...]."""
    return jnp.concatenate(jnp.split(leaf, 2, axis=1))


def _apart(leaf: jax.Array) -> jax.Array:
    """Return what was made of joined chunks as [2, B, ...]."""
    return jnp.stack(jnp.split(leaf, 2))


def _read(leaf: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)


def _write(leaf: jax.Array, own: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, own, index, 0)


def _vary(tree: Any, *like: jax.Array) -> Any:
    """Mark the start of a loop as its results will be."""
    axes: Sequence[str] = varying_axes(*jax.tree.leaves(tree), *like)
    return jax.tree.map(lambda leaf: mark_varying(leaf, axes), tree)
