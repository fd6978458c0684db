"""Attention where a device has a part of each sequence, or whole ones: a gather, an exchange, or neither."""

from typing import Any

import jax

from ...meshes import ShardingRules
from ...meshes.device_axes import manual_axes
from ..attention.blockwise import Limits
from ..attention.flash import attend_causally, choose_kernel
from ..config import ModelConfig
from .exchanged import attend_exchanged
from .fused_tiles import FusedKernel
from .gathered import How, attend_gathered
from .plain_tiles import PlainKernel


def attend_in_context(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    config: ModelConfig,
    rules: ShardingRules,
    segments_BT: jax.Array | None = None,
    is_windowed: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention of sequences whose tokens are split over context axes.

    q[B@data, T@context, N@tensor, H], k and v[B@data, T@context, K@tensor, H] -> mixed[B@data, T@context, N@tensor, H]

    Heads are exchanged for tokens where the rules split the dim "attention_heads" over context too; else keys and
    values are gathered, and once more in the backward where the rules split "kept_keys".

    Args:
        segments_BT: the number of each token's document; None where a sequence is one document.
        is_windowed: whether the window counts in this layer, bool []; it does if left out.
        sinks_N: a score of each head that has no key, [N@tensor], see `../options/sinks.py`.

    Raises:
        ModelError: the config asks for a kernel that the devices do not support.
    """
    context = manual_axes(rules.axes("tokens"))
    if not context:
        more: dict[str, Any] = {"segments_BT": segments_BT, "is_windowed": is_windowed, "sinks_N": sinks_N}
        return attend_causally(q_BTNH, k_BTKH, v_BTKH, config=config, **more)
    if set(context) <= set(rules.axes("attention_heads")):
        more = {"segments_Bt": segments_BT, "is_windowed": is_windowed, "sinks_N": sinks_N}
        return attend_exchanged(q_BTNH, k_BTKH, v_BTKH, config=config, axes=context, **more)
    how = _choose_how(config, rules, has_documents=segments_BT is not None)
    return attend_gathered(q_BTNH, k_BTKH, v_BTKH, Limits(segments_BT, is_windowed, sinks_N), how)


def _choose_how(config: ModelConfig, rules: ShardingRules, *, has_documents: bool) -> How:
    # cuDNN's kernel has no mask between two chunks but the causal one.
    is_plain = has_documents or config.attention_window or choose_kernel(config) == "xla"
    return How(
        window=config.attention_window,
        axes=manual_axes(rules.axes("tokens")),
        kernel=PlainKernel(config.attention_softcap) if is_plain else FusedKernel(),
        kept="own" if rules.axes("kept_keys") else "all",
    )
