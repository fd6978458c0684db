"""The adapter of an output table of its own: logits = x (W + s B A)^T, with the table W[V, D] frozen.

    W[V@vocab, D]    A[D, r]    B[V@vocab, r]    as rows of words, as the table has them

The sum is made where the table is used, once a microbatch, and its gradient is that of the table, from which those of A
and B follow: the loss is fused with its product (`../projected_loss.py`), and a second product in each chunk of tokens
would read B again for every one. It takes the memory of a table's gradient, as a table that is trained does.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...meshes import ShardingRules
from ...meshes.device_axes import manual_axes, mark_varying
from ..partitioning import make_param, param_metadata
from .adapter import column_lengths, relative_lengths
from .check_config import Lora


def make_head_adapter(
    rngs: nnx.Rngs, lora: Lora | None, table_VD: jax.Array, rules: ShardingRules
) -> tuple[Any, Any, Any]:
    """Return A [D, r], B [V, r] and magnitudes [V] of a table, None for each that there is not."""
    if lora is None:
        return nnx.data(None), nnx.data(None), nnx.data(None)
    (words, d), rank = table_VD.shape, lora.rank
    a = make_param(rngs.params(), (d, rank), ("embed", "lora"), std=d**-0.5, rules=rules)
    b = make_param(rngs.params(), (words, rank), ("vocab", "lora"), std=0.0, rules=rules)
    if lora.magnitude == "off":
        return a, b, nnx.data(None)
    return a, b, nnx.Param(column_lengths(table_VD.T), **param_metadata(("vocab",), rules))


def adapted_table(head: Any, axes: Sequence[str]) -> jax.Array:
    """Return the float32 table by which a head with an adapter multiplies: W[V@axes, D] -> [V@axes, D].

    Rows of padding, of length 0, stay 0.
    """
    table_VD = jax.lax.stop_gradient(head.table[...])
    a_Dr, b_Vr = mark_varying(head.lora_a[...], manual_axes(axes)), head.lora_b[...]
    whole_VD = table_VD.astype(jnp.float32) + head.lora.scale * jnp.einsum("vr,dr->vd", b_Vr, a_Dr, precision="highest")
    if head.lora_m is None:
        return whole_VD
    factor_V = relative_lengths(table_VD.T, a_Dr, b_Vr.T, head.lora_m[...], scale=head.lora.scale, rows=())
    return whole_VD * factor_V[:, None]
