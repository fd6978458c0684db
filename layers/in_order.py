"""Collectives one after another on CPUs, whose devices cannot tell those of one kind and group apart.

In a turn of a pipeline nothing orders, say, the exchange of activations and that of gradients. XLA for CPUs may run
both at once, on several threads of a device, and as jax gives all collectives the channel 1, devices meet by kind and
group:

    device 0    exchange of activations ... permute --+--  each takes the other's permute for its own: wrong numbers,
    device 1    exchange of gradients   ... permute --+    or "Id can't be larger than the number of ... threads"

XLA starts a collective after an earlier one has ended, but as soon as an earlier loop or conditional has started; in a
program from the compilation cache it does not order loops and what stands beside them at all. What reads memory that
they write does wait. So what communicates in a loop or conditional changes a mark, and what comes next reads it.
On GPUs, whose collectives queue up in one order, there are no marks.

TODO: delete with a jaxlib that waits for the end of a loop or conditional (jax 0.10.2 to 0.12 do not).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

from ..meshes.device_kind import device_kind

Mark = jax.Array | None
"""A number that loops and conditionals change, int32 []; None where there is no need for it."""

Tree = TypeVar("Tree")


def start_mark() -> Mark:
    """Return the mark before the first loop or conditional."""
    return jnp.zeros((), jnp.int32) if device_kind() == "cpu" else None


def next_mark(mark: Mark) -> Mark:
    """Return the mark after an iteration or a branch that communicates."""
    # XLA would know the end of a sum after a known number of iterations without running them.
    return None if mark is None else 5 * mark + 1


def after(mark: Mark, condition: jax.Array) -> jax.Array:
    """Return the condition of the next conditional, which XLA for CPUs computes only once the mark is there."""
    return condition if mark is None else condition & (_one_for(mark) == 1)


def zero_after(mark: Mark) -> jax.Array | int:
    """Return 0, to be added to the index of what comes next: XLA for CPUs computes it only once the mark is there."""
    return 0 if mark is None else 1 - _one_for(mark)


def held(values: Tree, *, until: jax.Array) -> Tree:
    """Return the values, which XLA for CPUs passes on only once a number is there that a loop changes. Costs a copy."""
    if device_kind() != "cpu":
        return values
    is_there = _one_for(until) == 1
    return jax.tree.map(lambda leaf: jnp.where(is_there, leaf, jnp.zeros_like(leaf)), values)


def _one_for(mark: jax.Array) -> jax.Array:
    """Return 1, for which XLA reads the mark since it does not see that nothing else can come of it.

    The inspector does (`programs/static_values.py`), as it has to know which branches a device runs.
    """
    one = jnp.ones((), mark.dtype)
    return jax.lax.clamp(one, mark, one)
