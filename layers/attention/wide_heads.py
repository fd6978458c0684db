"""cuDNN's flash attention for heads of more than 128 features, and for values narrower than keys.

    jax.nn.dot_product_attention     heads of 128 features or fewer, values as wide as keys: asks this machine's GPU
                                     for more, and raises where a program is compiled for GPUs that are not here
    this file                        the same call of XLA, from Hopper on: heads of up to 256 features, and the keys of
                                     192 and values of 128 that DeepSeek's latents give

The call is XLA's `__cudnn$fmhaSoftmax`, through `jax.ffi`; what it computes is described by a JSON text of two products
and a mask. A test compares it, letter by letter, with what jax makes of sizes that both can run. Read `flash.py` next.
"""

import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...meshes.device_axes import mark_varying, sum_like, varying_axes

_STATUS_RETURNING = 2
"""Version of the interface between XLA and its custom calls that these have."""

_PRODUCTS = {
    "bmm1": ((3, 3), (0, 2), (0, 2)),
    "bmm2": ((3, 1), (0, 1), (0, 2)),
    "bmm1_grad_gemm1": ((2, 1), (0, 1), (0, 2)),
    "bmm1_grad_gemm2": ((3, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm1": ((2, 1), (0, 1), (0, 2)),
    "bmm2_grad_gemm2": ((3, 3), (0, 2), (0, 2)),
}
"""Contracted dims and batch dims of scores [B, N, T, S] and arrays [B, T, N, H]: forward, then of its gradients."""


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def attend_wide(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, window: int, causal: bool) -> jax.Array:
    """Run the kernel: q[B, T, N, H], k[B, S, K, H], v[B, S, K, U] -> mixed[B, T, N, U], all bfloat16.

    For use on one device or inside `shard_map`: the compiler splits no custom call.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKU, window, causal)[0]


def _forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKU: jax.Array, window: int, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    (b, t, n, _), u = q_BTNH.shape, v_BSKU.shape[3]
    kinds = jax.ShapeDtypeStruct((b, n, t, u), q_BTNH.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    text = describe_call(q_BTNH.shape, k_BSKH.shape, window=window, causal=causal, products=("bmm1", "bmm2"))
    y_BNTU, sums_BNT = _call("__cudnn$fmhaSoftmax", kinds, text, q_BTNH, k_BSKH, v_BSKU)
    y_BTNU = jnp.swapaxes(y_BNTU, 1, 2)
    return y_BTNU, (q_BTNH, k_BSKH, v_BSKU, sums_BNT, y_BTNU)


def _backward(window: int, causal: bool, saved: tuple[jax.Array, ...], grad_BTNU: jax.Array) -> tuple[jax.Array, ...]:
    q_BTNH, k_BSKH, v_BSKU, sums_BNT, y_BTNU = saved
    kinds = tuple(
        jax.ShapeDtypeStruct((leaf.shape[0], leaf.shape[2], leaf.shape[1], leaf.shape[3]), leaf.dtype)
        for leaf in (q_BTNH, k_BSKH, v_BSKU)
    )
    text = describe_call(q_BTNH.shape, k_BSKH.shape, window=window, causal=causal, products=tuple(_PRODUCTS)[2:])
    found = _call("__cudnn$fmhaSoftmaxBackward", kinds, text, q_BTNH, k_BSKH, v_BSKU, sums_BNT, grad_BTNU, y_BTNU)
    return tuple(
        sum_like(jnp.swapaxes(leaf, 1, 2), primal) for leaf, primal in zip(found, (q_BTNH, k_BSKH, v_BSKU), strict=True)
    )


attend_wide.defvjp(_forward, _backward)


def _call(target: str, kinds: tuple[Any, ...], text: str, *operands: jax.Array) -> list[jax.Array]:
    """Return the results of a call, in the layout of [B, T, N, H] whatever the order of their dims."""
    workspace = jax.ShapeDtypeStruct((0,), jnp.uint8)
    layouts = [(0, 2, 1, 3) if len(kind.shape) == 4 else tuple(range(len(kind.shape))) for kind in (*kinds, workspace)]
    call = jax.ffi.ffi_call(
        target,
        (*kinds, workspace),
        custom_call_api_version=_STATUS_RETURNING,
        legacy_backend_config=text,
        output_layouts=layouts,
    )
    axes = varying_axes(*operands)
    *found, _ = call(*(mark_varying(leaf, axes) for leaf in operands))
    return [mark_varying(leaf, axes) for leaf in found]


def describe_call(
    q_shape: tuple[int, ...], k_shape: tuple[int, ...], *, window: int, causal: bool, products: tuple[str, ...]
) -> str:
    """Return the JSON text by which XLA builds the kernel."""
    (b, t, n, h), s = q_shape, k_shape[1]
    layout = {"dim_level_types": [], "dim_unique": [], "dim_ordered": [], "minor_to_major": ["3", "2", "1", "0"]}
    layout |= {"tiles": [], "element_size_in_bits": "0", "memory_space": "0"}
    layout |= {f"{what}_primitive_type": "PRIMITIVE_TYPE_INVALID" for what in ("index", "pointer")}
    scores = {"element_type": "BF16", "dimensions": [str(size) for size in (b, n, t, s)], "tuple_shapes": []}
    scores |= {"layout": layout | {"dynamic_shape_metadata_prefix_bytes": "0"}, "is_dynamic_dimension": [False] * 4}
    algorithm = {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "tuning_knobs": {"17": "1", "24": "0"}}
    algorithm |= {"is_cudnn_frontend": True, "workspace_size": "0"}
    config = {"algorithm": algorithm, "fmha_scale": 1 / np.sqrt(h), "intermediate_tensor_shape": scores}
    config |= {"is_flash_attention": True, "mask_type": "CAUSAL" if causal else "NO_MASK"}
    config |= {f"{name}_dot_dimension_numbers": _describe_product(*_PRODUCTS[name]) for name in products}
    config |= {"dropout_rate": 0.0, "seed": 42, "sliding_window_length": window, "max_seg_per_batch": 1}
    config |= {"is_paged_attention": False}
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config})


def _describe_product(
    contracted: tuple[int, int], of_left: tuple[int, ...], of_right: tuple[int, ...]
) -> dict[str, list[str]]:
    found = {"lhs_contracting": contracted[:1], "rhs_contracting": contracted[1:]}
    found |= {"lhs_batch": of_left, "rhs_batch": of_right}
    return {f"{name}_dimensions": [str(dim) for dim in dims] for name, dims in found.items()}
