"""Causal attention: cuDNN's flash attention on NVIDIA GPUs, blocks in plain XLA elsewhere (`blockwise.py`).

Plain XLA also runs float32 and head sizes that cuDNN does not support. The kernel is chosen while tracing, from the
devices of the mesh in context, so a program compiled for absent GPUs uses the kernel that those GPUs would. The
algorithm is that of Dao 2023 ("FlashAttention-2", section 3); its residuals are the inputs, the output and one number
for every query.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from ...meshes import ModelError
from ...meshes.device_axes import manual_axes
from ...meshes.device_kind import device_kind as kind_of_devices
from ...meshes.device_kind import is_hopper_or_later, is_nvidia
from ..config import LARGEST_FUSED_HEAD, ModelConfig
from ..options.by_layer import choose_window
from ..options.sinks import add_sinks, sink_grads
from .blockwise import FLASH_OUTPUTS, Limits, attend_blockwise
from .wide_heads import attend_wide

Kernel = Literal["xla", "cudnn"]
"""The implementation of attention."""


def choose_kernel(config: ModelConfig, *, device_kind: str | None = None) -> Kernel:
    """Return the attention kernel of a model on devices of this kind; those of the mesh in context if left out.

    Wide heads have a call that the compiler does not split, so it is made inside `shard_map` and on one device alone.

    Raises:
        ModelError: the config asks for cuDNN, and the devices are not NVIDIA GPUs, or not new enough for its heads.
    """
    kind = device_kind or kind_of_devices()
    if config.attention == "cudnn" and not is_nvidia(kind):
        raise ModelError(
            f"attention='cudnn' needs NVIDIA GPUs, but the devices are {kind!r}.", fix="set model.attention='auto'."
        )
    suits = is_nvidia(kind) and config.can_be_fused
    if suits and config.has_wide_heads:
        suits = is_hopper_or_later(kind) and _is_local()
        if config.attention == "cudnn" and not suits:
            raise ModelError(
                f"attention='cudnn' with head_size={config.head_size} needs a GPU from Hopper on and a `shard_map`; "
                f"the devices are {kind!r}.",
                fix="set model.attention='auto', which takes XLA's kernel where cuDNN has none.",
            )
    return "cudnn" if config.attention != "xla" and suits else "xla"


def _is_local() -> bool:
    """Return whether arrays are blocks of one device: the mesh in context is manual, or of one device, or none."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or set(manual_axes(mesh.axis_names)) == {axis for axis, size in mesh.shape.items() if size > 1}


def attend_causally(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    config: ModelConfig,
    segments_BT: jax.Array | None = None,
    is_windowed: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Compute causal attention within the last `attention_window` tokens, and within each token's document.

    q[B@data, T, N@tensor, H], k and v[B@data, T, K@tensor, H] -> mixed[B@data, T, N@tensor, H]; no communication.

    Args:
        is_windowed: whether the window counts in this layer, bool []; it does if left out.
        sinks_N: a score of each head that has no key, [N@tensor], see `../options/sinks.py`.

    Raises:
        ModelError: the config asks for a kernel that the devices do not support.
    """
    window, cap = config.attention_window, config.attention_softcap
    # jax has no documents in cuDNN's attention.
    if choose_kernel(config) == "xla" or segments_BT is not None:
        more: dict[str, Any] = {"is_windowed": is_windowed, "cap": cap, "sinks_N": sinks_N}
        return attend_blockwise(q_BTNH, k_BTKH, v_BTKH, window, segments_BT, **more)
    # Under `jax.jit` jax's own rule splits the kernel over batch and heads.
    return _attend_flash(q_BTNH, k_BTKH, v_BTKH, Limits(is_windowed=is_windowed, sinks=sinks_N), window)


def attend_fused(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, window: int, causal: bool = True
) -> jax.Array:
    """Run cuDNN's kernel: causal within a window, or every query with every key.

    Raises:
        ModelError: jax finds no cuDNN.
    """
    if q_BTNH.shape[-1] > LARGEST_FUSED_HEAD or q_BTNH.shape[-1] != v_BSKH.shape[-1]:
        return attend_wide(q_BTNH, k_BSKH, v_BSKH, window, causal)
    seen = (window - 1, 0) if window else None
    try:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, is_causal=causal, local_window_size=seen, implementation="cudnn"
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
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_flash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, limits: Limits, window: int) -> jax.Array:
    if limits.sinks is not None:
        # The kernel alone does not return its sums.
        return _flash_forward(q_BTNH, k_BTKH, v_BTKH, limits, window)[0]

    def run(window: int, *qkv: jax.Array) -> jax.Array:
        return attend_fused(*qkv, window=window)

    return choose_window(limits.is_windowed, window, run, q_BTNH, k_BTKH, v_BTKH)


def _flash_forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, limits: Limits, window: int
) -> tuple[jax.Array, Any]:
    def run(window: int, *qkv: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return run_fused(partial(attend_fused, window=window), *qkv)

    qkv = q_BTNH, k_BTKH, v_BTKH
    y_BTNH, made = choose_window(limits.is_windowed, window, run, *qkv)
    if limits.sinks is not None:
        (sums_BNT,) = made
        y_BTNH, *made = add_sinks(y_BTNH, sums_BNT, limits.sinks)
    y_BTNH, made = checkpoint_name((y_BTNH, made), FLASH_OUTPUTS)
    return y_BTNH, ((*qkv, y_BTNH), made, limits)


def _flash_backward(window: int, saved: Any, grad_BTNH: jax.Array) -> tuple[Any, ...]:
    def run(window: int, *given: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        *qkv, y_BTNH, grad_BTNH = given[:5]
        return fused_grads(partial(attend_fused, window=window), tuple(qkv), y_BTNH, list(given[5:]), grad_BTNH)

    arrays, made, limits = saved
    d_sinks_N = None if limits.sinks is None else sink_grads(grad_BTNH, arrays[3], made[0], limits.sinks)
    return (*choose_window(limits.is_windowed, window, run, *arrays, grad_BTNH, *made), Limits(sinks=d_sinks_N))


_attend_flash.defvjp(_flash_forward, _flash_backward)


def run_fused(
    attend: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array
) -> tuple[jax.Array, list[jax.Array]]:
    """Return the output of a kernel, and what it makes for its backward: logarithms of softmax sums [B, N, T]."""
    # jax's vjp of the kernel is a tree whose leaves are its residuals; inputs and output are among them.
    qkv = q_BTNH, k_BSKH, v_BSKH
    y_BTNH, vjp = jax.vjp(attend, *qkv)
    return y_BTNH, [leaf for leaf in jax.tree.leaves(vjp) if leaf.size and not _is_among(leaf, (*qkv, y_BTNH))]


def fused_grads(
    attend: Callable[..., jax.Array],
    qkv: tuple[jax.Array, ...],
    y_BTNH: jax.Array,
    made: list[jax.Array],
    grad_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries, keys and values by a kernel, from what `run_fused` returned."""
    # The forward is traced again for the tree alone: all that it computes is replaced, so the compiler drops it.
    traced_BTNH, vjp = jax.vjp(attend, *qkv)
    leaves, tree = jax.tree.flatten(vjp)
    rest = iter(made)

    def restore(leaf: jax.Array) -> jax.Array:
        if leaf is traced_BTNH:
            return y_BTNH
        return leaf if not leaf.size or _is_among(leaf, qkv) else next(rest)

    return jax.tree.unflatten(tree, list(map(restore, leaves)))(grad_BTNH)


def _is_among(leaf: jax.Array, arrays: Iterable[jax.Array]) -> bool:
    return any(leaf is one for one in arrays)
