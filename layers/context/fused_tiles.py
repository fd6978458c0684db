"""A pair of chunks by cuDNN's flash attention: causal on the diagonal, without a mask below it.

The backward of a pair is that of the kernel, given the output and the softmax's sums over the keys of all pairs: the
share of a key among all is then what the kernel computes, and so is its part of each gradient. jax has no documents in
this kernel, and no window between two chunks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..attention.flash import attend_fused, fused_grads, run_fused
from .tiles import Mask, Queries, Tile


@dataclass(frozen=True)
class FusedKernel:
    """cuDNN's kernel for a pair of chunks; its outputs are rounded to the compute dtype before they are merged."""

    def attend(self, q_BnNH: jax.Array, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask) -> Tile:
        """Return what these keys alone give."""
        mixed, (sums,) = run_fused(_kernel(mask), q_BnNH, k_BnKH, v_BnKH)
        return Tile(mixed.astype(jnp.float32), sums)

    def grads(
        self, of: Queries, k_BnKH: jax.Array, v_BnKH: jax.Array, mask: Mask
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the part of the gradients of queries, keys and values that comes by these keys."""
        return fused_grads(_kernel(mask), (of.q, k_BnKH, v_BnKH), of.y, [of.sums], of.grad)


def _kernel(mask: Mask) -> Any:
    assert mask.segments is None
    assert not mask.window
    return partial(attend_fused, window=0, causal=mask.ahead is None)
