"""Choose how attention meets a context axis: gather keys and values, or nothing where a device has whole sequences."""

import jax

from ...meshes.device_axes import manual_axes
from ..config import ModelConfig
from ..flash import attend_causally, choose_kernel
from .fused_tiles import FusedKernel
from .gathered import How, attend_gathered
from .plain_tiles import PlainKernel


def attend_in_context(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    config: ModelConfig,
    axes: tuple[str, ...],
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention of sequences whose tokens are split over context axes.

    q[B@data, T@context, N@tensor, H], k and v[B@data, T@context, K@tensor, H] -> mixed[B@data, T@context, N@tensor, H]

    Args:
        segments_BT: the number of each token's document; None where a sequence is one document.

    Raises:
        ModelError: the config asks for a kernel that the devices do not support.
    """
    context = manual_axes(axes)
    if not context:
        return attend_causally(q_BTNH, k_BTKH, v_BTKH, config=config, segments_BT=segments_BT)
    # cuDNN's kernel has no mask between two chunks but the causal one.
    is_plain = segments_BT is not None or config.attention_window or choose_kernel(config) == "xla"
    how = How(window=config.attention_window, axes=context, kernel=PlainKernel() if is_plain else FusedKernel())
    return attend_gathered(q_BTNH, k_BTKH, v_BTKH, segments_BT, how)
