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
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ..meshes import ModelError, ShardingRules
from .blockwise import FLASH_OUTPUTS, attend_blockwise
from .config import ModelConfig

Kernel = Literal["xla", "cudnn"]
"""The implementation of attention."""


def choose_kernel(config: ModelConfig, *, device_kind: str | None = None) -> Kernel:
    """Return the attention kernel of a model on devices of this kind; those of the mesh in context if left out.

    Raises:
        ModelError: the config asks for cuDNN, and the devices are not NVIDIA GPUs.
    """
    kind = device_kind or _device_kind()
    is_nvidia = kind.startswith("NVIDIA")
    if config.attention == "cudnn" and not is_nvidia:
        raise ModelError(
            f"attention='cudnn' needs NVIDIA GPUs, but the devices are {kind!r}.", fix="set model.attention='auto'."
        )
    return "cudnn" if config.attention != "xla" and is_nvidia and config.can_be_fused else "xla"


def attend_causally(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, *, config: ModelConfig, rules: ShardingRules
) -> jax.Array:
    """Compute causal attention within the last `attention_window` tokens.

    q[B@data, T, N@tensor, H], k and v[B@data, T, K@tensor, H] -> mixed[B@data, T, N@tensor, H]; no communication.

    Raises:
        ModelError: the config asks for a kernel that the devices do not support.
    """
    if choose_kernel(config) == "xla":
        return attend_blockwise(q_BTNH, k_BTKH, v_BTKH, config.attention_window)
    return _attend_flash(q_BTNH, k_BTKH, v_BTKH, config.attention_window, rules)


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


# All axes are manual around the kernel: jax's own partitioning of it does not lower inside a partly manual region. The
# gradient is written by hand because autodiff of a nested `shard_map` does not lower there either (see embedding.py).
@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend_flash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, rules: ShardingRules
) -> jax.Array:
    flash = partial(_attend, window=window)
    heads = _specs(rules)[4]
    return _in_blocks(flash, (heads,) * 3, heads)(q_BTNH, k_BTKH, v_BTKH)


def _flash_forward(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, window: int, rules: ShardingRules
) -> tuple[jax.Array, Any]:
    flash, specs = partial(_attend, window=window), _specs(rules)

    # jax's vjp of the kernel is a tree whose leaves are its residuals. Inputs and output among them are kept as they
    # are; `made` are the others, the logarithms of the softmax sums.
    def block(*qkv: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        y_BTNH, vjp = jax.vjp(flash, *qkv)
        return y_BTNH, [leaf for leaf in jax.tree.leaves(vjp) if leaf.size and not _is_among(leaf, (*qkv, y_BTNH))]

    made = jax.eval_shape(lambda *qkv: block(*qkv)[1], q_BTNH, k_BTKH, v_BTKH)
    out_specs = specs[4], [specs[leaf.ndim] for leaf in made]
    run = _in_blocks(block, (specs[4],) * 3, out_specs)
    y_BTNH, made = checkpoint_name(run(q_BTNH, k_BTKH, v_BTKH), FLASH_OUTPUTS)
    return y_BTNH, ((q_BTNH, k_BTKH, v_BTKH, y_BTNH), made)


def _flash_backward(
    window: int, rules: ShardingRules, saved: tuple[tuple[jax.Array, ...], list[jax.Array]], grad_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    flash, specs = partial(_attend, window=window), _specs(rules)

    def block(
        known: tuple[jax.Array, ...], made: list[jax.Array], grad_BTNH: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # The forward is traced again for the tree alone: all that it computes is replaced, so the compiler drops it.
        *qkv, y_BTNH = known
        traced_BTNH, vjp = jax.vjp(flash, *qkv)
        leaves, tree = jax.tree.flatten(vjp)
        rest = iter(made)

        def restore(leaf: jax.Array) -> jax.Array:
            if leaf is traced_BTNH:
                return y_BTNH
            return leaf if not leaf.size or _is_among(leaf, qkv) else next(rest)

        return jax.tree.unflatten(tree, list(map(restore, leaves)))(grad_BTNH)

    in_specs = (specs[4],) * 4, [specs[leaf.ndim] for leaf in saved[1]], specs[4]
    return _in_blocks(block, in_specs, (specs[4],) * 3)(*saved, grad_BTNH)


def _is_among(leaf: jax.Array, arrays: Iterable[jax.Array]) -> bool:
    return any(leaf is one for one in arrays)


_attend_flash.defvjp(_flash_forward, _flash_backward)


def _in_blocks(run: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Return the function run on each device's block: every Auto axis is made manual, those of size 1 too.

    Without an Auto axis, outside any mesh or where all are manual already, return the function itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = {axis for axis, kind in kinds if kind == AxisType.Auto}
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, axis_names=axes) if axes else run


def _specs(rules: ShardingRules) -> dict[int, P]:
    """Return the specs by rank: 4 for [B, T, heads, H], 3 for the [B, heads, T] numbers kept for the backward."""
    batch, heads = rules.auto_axes("batch") or None, rules.auto_axes("heads") or None
    return {4: P(batch, None, heads), 3: P(batch, heads)}


def _device_kind() -> str:
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.device_kind if device is not None else jax.devices()[0].device_kind
