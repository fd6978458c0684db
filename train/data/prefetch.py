"""Prefetch batches in a thread: read and place the next one while the devices work on the current step."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

import jax
import numpy as np

Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Index the results of `make(step)`, computing the next step ahead in a thread; use as a context manager.

    An error that `make` raises for a step is raised when that step is asked for, not before.

    >>> with Prefetch(lambda step: step**2, end=10) as squares:
    ...     [squares[step] for step in range(3)]
    [0, 1, 4]

    Args:
        end: number of steps; no result is computed ahead for this index or a later one.
    """

    def __init__(self, make: Callable[[int], Batch], *, end: int) -> None:
        self._make, self._end = make, end
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __getitem__(self, step: int) -> Batch:
        ready = self._ahead[1] if self._ahead and self._ahead[0] == step else self._start(step)
        batch = ready.result()
        self._ahead = (step + 1, self._start(step + 1)) if step + 1 < self._end else None
        return batch

    def _start(self, step: int) -> "Future[Batch]":
        return self._thread.submit(self._make, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)


def place_batch(batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Place a batch on the devices; every process holds the whole batch and transfers the part of its own devices."""
    # This transfer is intended, so a user's jax_transfer_guard does not apply to it.
    with jax.transfer_guard("allow"):
        return {
            name: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__) for name, leaf in batch.items()
        }
