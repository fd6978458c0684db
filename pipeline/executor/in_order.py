"""Conditionals of a turn one after another on CPUs, whose devices cannot tell collectives of one kind apart.

Nothing in a turn orders, say, the exchange of activations and that of gradients, and XLA for CPUs may run both at once,
on several threads of a device. As jax gives all collectives the channel 1, devices meet by kind and group alone:

    device 0    exchange of activations ... permute --+--  each takes the other's permute for its own: wrong numbers,
    device 1    exchange of gradients   ... permute --+    or "Id can't be larger than the number of ... threads"

XLA starts a collective after an earlier one has ended, but as soon as an earlier loop or conditional has started. What
reads memory that they write does wait. So each conditional counts one up, and the next one's condition reads the count.
On GPUs, whose collectives queue up in one order, nothing is counted.

TODO: delete with a jaxlib that waits for the end of a loop or conditional (jax 0.10.2 to 0.12 do not).
"""

import jax
import jax.numpy as jnp

from ...meshes.device_kind import device_kind

Count = jax.Array | None
"""Number of conditionals that were run, int32 []; None where there is no need for it."""


def start_count() -> Count:
    """Return the count before the first conditional."""
    return jnp.zeros((), jnp.int32) if device_kind() == "cpu" else None


def one_more(count: Count) -> Count:
    """Return the count after a conditional, for the branch that communicates to return."""
    return None if count is None else count + 1


def after(count: Count, condition: jax.Array) -> jax.Array:
    """Return the condition of the next conditional, which XLA for CPUs computes only once the count is there.

    The count is clamped to 1 and compared with it. XLA does not see that this is always true; the inspector does (see
    `programs/static_values.py`), as it has to know which conditionals a device runs.
    """
    if count is None:
        return condition
    one = jnp.ones((), count.dtype)
    return condition & (jax.lax.clamp(one, count, one) == 1)
