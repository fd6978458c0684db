"""Split experts over an axis without an exchange: each device runs its own experts on the tokens of all, and sums.

    2 devices, experts 0 1 | 2 3, tokens a b | c d

    gather over expert       a b c d       | a b c d
    own experts, weighted    0 and 1 of all | 2 and 3 of all        zeros for a token that chose none of them
    sum, own tokens          a b           | c d                    one reduce-scatter

For n tokens a device, e devices and E experts with room for C rows each, it sends 2 n D (e - 1) numbers a device, and
the all-to-alls of `rounds.py` 2 E C D (e - 1) / e. A server gives each expert room for every token, C = n, so that no
request waits for another: the sum is E / e times cheaper. With room for the mean load, C = c n k / E, it is cheaper up
to e = c k devices. Both multiply as many rows. Where each expert has its room no loop depends on tokens of others.
"""

import jax
import jax.numpy as jnp

from ...meshes.device_axes import block_index, manual_axes, mark_varying, num_manual_blocks, varying_axes
from ..config import ModelConfig
from .rounds import Kernels, Room, add_further_rounds, run_round
from .router import Router
from .slots import order_pairs


def is_sum_cheaper(config: ModelConfig, *, num_tokens: int, parts: int) -> bool:
    """Return whether the sum sends no more than all-to-alls do, for so many tokens a device and parts of the experts.

    >>> sizes = {"vocab_size": 256, "num_layers": 1, "hidden_size": 64, "num_heads": 4, "bias": "off"}
    >>> config = ModelConfig(num_experts=8, experts_per_token=2, **sizes)
    >>> [is_sum_cheaper(config, num_tokens=4096, parts=parts) for parts in (2, 4)]
    [True, False]
    """
    return num_tokens * parts <= config.num_experts * config.expert_rows(num_tokens)


def run_own_experts(
    x_nD: jax.Array, router: Router, kernels: Kernels, *, room: Room, axes: tuple[str, ...]
) -> jax.Array:
    """Return what all experts make of this device's tokens: x[n, D] -> y[n, D], partial sums where F is split.

    One all-gather of x over the axes of the experts, and one reduce-scatter of y.

    Args:
        room: that of this device's experts for the tokens of all; nothing is exchanged.
    """
    manual = manual_axes(axes)
    all_nD = jax.lax.all_gather(x_nD, manual, axis=0, tiled=True)
    routing = router(all_nD[None])
    own = router.config.num_experts // num_manual_blocks(axes)
    place_nk = routing.experts[0] - block_index(axes) * own
    # Past the last: an expert of another device, which has no row here and adds zeros.
    place_nk = jnp.where((place_nk >= 0) & (place_nk < own), place_nk, own)
    order = order_pairs(place_nk, num_experts=own)
    # Each device of tensor has all tokens, and a part of the features of each expert.
    varying = varying_axes(kernels.up.kernel)
    given = (
        mark_varying(all_nD.astype(router.config.dtype), varying),
        mark_varying(routing.weights[0], varying),
        kernels,
    )
    y_nD = run_round(*given, room.slots(order, 0), room)
    if room.capacity < len(all_nD):
        y_nD = add_further_rounds(y_nD, given, order, room)
    return jax.lax.psum_scatter(y_nD, manual, scatter_dimension=0, tiled=True)
