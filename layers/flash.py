"""Causal attention: cuDNN's flash attention on NVIDIA GPUs, blocks in plain XLA elsewhere (`blockwise.py`).

Plain XLA also runs float32 and head sizes that cuDNN does not support. The kernel is chosen while tracing, from the
devices of the mesh in context, so a program compiled for absent GPUs uses the kernel that those GPUs would. The
algorithm is that of Dao 2023 ("FlashAttention-2", section 3); its residuals are the inputs, the output and one number
for every query.
"""

from collections.abc import Iterable
from functools import partial
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from ..meshes import ModelError
from ..meshes.device_kind import device_kind as kind_of_devices
from ..meshes.device_kind import is_nvidia
from .blockwise import FLASH_OUTPUTS, attend_blockwise
from .config import ModelConfig

Kernel = Literal["xla", "cudnn"]
"""The implementation of attention."""


def choose_kernel(config: ModelConfig, *, device_kind: str | None = None) -> Kernel:
    """Return the attention kernel of a model on devices of this kind; those of the mesh in context if left out.

    Raises:
        ModelError: the config asks for cuDNN, and the devices are not NVIDIA GPUs.
    """
    kind = device_kind or kind_of_devices()
    if config.attention == "cudnn" and not is_nvidia(kind):
        raise ModelError(
            f"attention='cudnn' needs NVIDIA GPUs, but the devices are {kind!r}.", fix="set model.attention='auto'."
        )
    return "cudnn" if config.attention != "xla" and is_nvidia(kind) and config.can_be_fused else "xla"


def attend_causally(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    config: ModelConfig,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention within the last `attention_window` tokens, and within each token's document.

    q[B@data, T, N@tensor, H], k and v[B@data, T, K@tensor, H] -> mixed[B@data, T, N@tensor, H]; no communication.

    Raises:
        ModelError: the config asks for a kernel that the devices do not support.
    """
    # jax has no documents in cuDNN's attention.
    if choose_kernel(config) == "xla" or segments_BT is not None:
        return attend_blockwise(q_BTNH, k_BTKH, v_BTKH, config.attention_window, segments_BT)
    # Under `jax.jit` jax's own rule splits the kernel over batch and heads.
    return _attend_flash(q_BTNH, k_BTKH, v_BTKH, config.attention_window)


def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, window: int) -> jax.Array:
    seen = (window - 1, 0) if window else None
    try:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=True, local_window_size=seen, implementation="cudnn"
        )
    except RuntimeError as error:
        # While tracing jax asks cuDNN for its version, also on machines that only compile.
        if "cuDNN" not in str(error):
            raise
        raise ModelError(
            f"attention on GPUs is cuDNN's, whose library jax cannot use here: {str(error).splitlines()[0][:200]}",
            fix="pip install 'trellax[cuda]', which brings it, or set model.attention='xla', another program.",
        ) from error


# The gradient is written by hand so that rematerialization can keep the kernel's residuals by their name.
@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend_flash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int) -> jax.Array:
    return _attend(q_BTNH, k_BTKH, v_BTKH, window=window)


def _flash_forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int
) -> tuple[jax.Array, tuple[tuple[jax.Array, ...], list[jax.Array]]]:
    # jax's vjp of the kernel is a tree whose leaves are its residuals. Inputs and output among them are kept as they
    # are; `made` are the others, the logarithms of the softmax sums [B, N, T].
    qkv = q_BTNH, k_BTKH, v_BTKH
    y_BTNH, vjp = jax.vjp(partial(_attend, window=window), *qkv)
    made = [leaf for leaf in jax.tree.leaves(vjp) if leaf.size and not _is_among(leaf, (*qkv, y_BTNH))]
    y_BTNH, made = checkpoint_name((y_BTNH, made), FLASH_OUTPUTS)
    return y_BTNH, ((*qkv, y_BTNH), made)


def _flash_backward(
    window: int, saved: tuple[tuple[jax.Array, ...], list[jax.Array]], grad_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    # The forward is traced again for the tree alone: all that it computes is replaced, so the compiler drops it.
    (*qkv, y_BTNH), made = saved
    traced_BTNH, vjp = jax.vjp(partial(_attend, window=window), *qkv)
    leaves, tree = jax.tree.flatten(vjp)
    rest = iter(made)

    def restore(leaf: jax.Array) -> jax.Array:
        if leaf is traced_BTNH:
            return y_BTNH
        return leaf if not leaf.size or _is_among(leaf, qkv) else next(rest)

    return jax.tree.unflatten(tree, list(map(restore, leaves)))(grad_BTNH)


def _is_among(leaf: jax.Array, arrays: Iterable[jax.Array]) -> bool:
    return any(leaf is one for one in arrays)


_attend_flash.defvjp(_flash_forward, _flash_backward)
