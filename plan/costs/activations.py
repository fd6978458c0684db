"""Bytes that one layer keeps for its backward, of one microbatch on one device, by kind of program.

Megatron's are the sums of Korthikanti et al. 2022, section 4, tensor by tensor, so that Llama shapes, grouped heads,
fused attention and programs without dropout follow from the same list. trellax's are those of `layers/counts.py`,
which the tests hold against the layers themselves. Read `memory_model.py` next.
"""

from ...layers import ModelConfig, Remat, activation_bytes
from .layouts import Layout
from .operations import item_bytes
from .program import Program

_FLOAT32 = 4


def layer_activation_bytes(model: ModelConfig, *, layout: Layout, program: Program, num_tokens: int) -> float:
    """Return the bytes that a layer keeps of one microbatch, by the layout's rematerialisation.

    >>> layer_activation_bytes(gpt, layout=Layout(tensor=8), program=MEGATRON, num_tokens=2048)
    """
    if program.clock == "async":
        return _megatron_bytes(model, layout=layout, program=program, num_tokens=num_tokens)
    remat: Remat = "dots" if layout.remat == "selective" else layout.remat
    counted = activation_bytes(
        model,
        num_sequences=layout.sequences,
        num_tokens=num_tokens,
        tensor=layout.tensor,
        remat=remat,
    )
    sizes = {"num_sequences": layout.sequences, "num_tokens": num_tokens, "tensor": layout.tensor}
    halves = halves_bytes(model, remat=remat, **sizes) if layout.is_backward_split else 0.0
    return (counted.layer + halves) / layout.context


def halves_bytes(model: ModelConfig, *, num_sequences: int, num_tokens: int, tensor: int, remat: Remat) -> float:
    """Return the bytes more that a layer keeps where its backward runs in two halves.

    Inputs and output gradients of products wait for the second half. Gradients take the place of residuals of their
    shape that only the first half reads (see `split_backward.py`). With "full" all that the first half recomputed
    waits: as much as with "dots".
    """
    t, d = tensor, model.hidden_size
    query, kv = model.query_size / t, max(model.kv_size / t, model.head_size)
    # What the last product reads is made again of what the activation function gives, and of what that is times.
    up = (2 if model.mlp == "swiglu" else 1) * model.ffn_size / t
    inputs, gradients = 2 * d + query + up, 2 * d + query + 2 * kv + up
    width = {
        "none": kv if model.qk_norm == "on" else query + 2 * kv,
        "dots": 2 * d + up,
        "full": inputs + gradients - d,
    }[remat]
    return num_sequences * num_tokens * width * item_bytes(model)


def boundary_bytes(model: ModelConfig, *, layout: Layout, program: Program, num_tokens: int) -> float:
    """Return the bytes of one microbatch's activation between two layers on one device."""
    split = layout.context * (layout.tensor if program.sequence_parallel == "on" else 1)
    return layout.sequences * num_tokens * model.hidden_size * item_bytes(model) / split


def _megatron_bytes(model: ModelConfig, *, layout: Layout, program: Program, num_tokens: int) -> float:
    if layout.remat == "full":
        return boundary_bytes(model, layout=layout, program=program, num_tokens=num_tokens)
    tokens, t, item = layout.sequences * num_tokens / layout.context, layout.tensor, item_bytes(model)
    mask = 1 if program.dropout == "on" else 0
    # Inputs of both norms and of the products behind them, and two dropout masks.
    whole = tokens * model.hidden_size * (4 * item + 2 * mask)
    if program.sequence_parallel == "on":
        whole /= t
    query, kv = model.query_size / t, max(model.kv_size / t, model.head_size)
    num_up = 2 if model.mlp == "swiglu" else 1
    # Queries, keys, values, the core's output; what the activation reads, and what it gives.
    split = tokens * item * (2 * query + 2 * kv + (num_up + 1) * model.ffn_size / t)
    scores = tokens * num_tokens * model.num_heads / t
    if program.attention == "fused":
        core = tokens * model.num_heads / t * _FLOAT32
    elif layout.remat == "none":
        core = scores * (program.score_bytes * (2 if mask else 1) + mask)
    else:
        core = 0.0
    return whole + split + core
