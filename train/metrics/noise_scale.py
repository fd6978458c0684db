"""Estimate the gradient noise scale: the batch size, in sequences, above which larger batches gain little.

After McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1. If the gradient of a sequence
has mean G and covariance S, that of a batch of n sequences has an expected squared norm of |G|^2 + tr(S) / n. A data
shard's gradient g_r, with a share p_r of the batch's n sequences, and the gradient g of the batch, the sum of all g_r:

    E sum |g_r|^2 = |G|^2 sum p_r^2 + tr(S) / n
    E |g|^2       = |G|^2           + tr(S) / n

Two equations for two unknowns: `signal` estimates |G|^2 and `spread` tr(S) / n. The noise scale is tr(S) / |G|^2. Of a
single step both are rough, `signal` even negative at times, so both are averaged over steps before they are divided.
"""

from collections import deque

import jax
import jax.numpy as jnp

NUM_STEPS = 50
"""Steps over which both are averaged."""


def measure_noise(
    grad_norm: jax.Array, shard_squares: jax.Array, weights: jax.Array, *, num_shards: int
) -> dict[str, jax.Array]:
    """Return `signal` and `spread` of one step, float32[].

    Args:
        grad_norm: of the whole batch, float32[].
        shard_squares: sum over shards of |g_r|^2, float32[].
        weights: of all tokens, [M, B@data, T], in sum 1; a shard's share is the sum of its own.
        num_shards: number of data shards.
    """
    shares = jnp.sum(weights, axis=(0, 2)).reshape(num_shards, -1).sum(axis=1)
    square = grad_norm * grad_norm
    signal = (square - shard_squares) / (1 - jnp.sum(shares * shares))
    return {"signal": signal, "spread": square - signal}


class NoiseScale:
    """The noise scale of the last steps; a resumed run begins a new average.

    >>> scale = NoiseScale(batch_size=32)
    >>> scale.add({"signal": 2.0, "spread": 1.0})
    >>> scale.sequences
    16.0

    Args:
        batch_size: sequences of a step.
    """

    def __init__(self, *, batch_size: int, num_steps: int = NUM_STEPS) -> None:
        self._batch_size = batch_size
        self._recent: deque[tuple[float, float]] = deque(maxlen=num_steps)

    def add(self, noise: dict[str, float]) -> None:
        """Add what `measure_noise` gave of a step; nothing if it is empty."""
        if noise:
            self._recent.append((noise["signal"], noise["spread"]))

    @property
    def sequences(self) -> float | None:
        """The noise scale in sequences; None before the first step, and where noise hides the gradient altogether."""
        signal, spread = (sum(step[part] for step in self._recent) for part in (0, 1))
        return self._batch_size * max(spread, 0.0) / signal if signal > 0 else None
