"""Count the residuals of one layer: the bytes it stores for its backward, of one microbatch on one device.

Megatron's are the list of Korthikanti et al. 2022, section 4, tensor by tensor, from which Llama shapes, grouped heads,
fused attention and models without dropout follow too. trellax's are those of `layers/counts.py`, which the tests
compare with the compiled layers. Read `memory_model.py` next.
"""

from functools import lru_cache
from typing import Any

from ...layers import ModelConfig, Remat, activation_bytes
from ...layers.attention.counts import attention_widths
from ...layers.context.choice import kept_ranks
from ...layers.counts import replaced_width
from ...layers.own.check_config import has_own_classes
from ...layers.own.trace import trace_products
from .layout import Layout
from .operations import item_bytes
from .runtime import OnOff, Runtime

_FLOAT32 = 4


def layer_activation_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of residuals that a layer stores for one microbatch, by the layout's rematerialization.

    >>> layer_activation_bytes(gpt, layout=Layout(tensor=8), runtime=MEGATRON, num_tokens=2048)
    """
    if runtime.residuals == "megatron":
        return _megatron_bytes(model, layout=layout, runtime=runtime, num_tokens=num_tokens)
    kept = _kept_bytes(
        model,
        num_sequences=layout.sequences,
        num_tokens=num_tokens,
        tensor=layout.tensor,
        sequence=runtime.sequence_parallel,
        remat="dots" if layout.remat == "selective" else layout.remat,
        is_backward_split=layout.is_backward_split,
        key_ranks=kept_ranks(layout.context_attention, context=layout.context, remat=layout.remat),
    )
    return kept / layout.context


@lru_cache(maxsize=4096)
def _kept_bytes(model: ModelConfig, *, is_backward_split: bool, key_ranks: int, **sizes: Any) -> float:
    """Return the bytes of a layer whose tokens are all on one device; most layouts of a search share them."""
    sizes["key_ranks"] = key_ranks
    deferred = split_backward_bytes(model, **sizes) + _misplaced_bytes(model, **sizes) if is_backward_split else 0.0
    return activation_bytes(model, **sizes).layer + deferred


def _misplaced_bytes(
    model: ModelConfig, *, num_sequences: int, num_tokens: int, tensor: int, remat: Remat, **_: Any
) -> float:
    """Return how much more than `split_backward_bytes` XLA takes where everything else is stored too.

    In programs for H200 the gradients of queries, keys and values replace those with tensor=1; with tensor=2 the
    feed-forward's do not replace its outputs, which are there twice.
    """
    if remat != "none" or has_own_classes(model) or model.num_experts or model.qk_norm != "off":
        return 0.0
    up = (2 if model.is_gated else 1) * model.ffn_size / tensor
    width = up if tensor > 1 else -attention_widths(model, tensor=1).projected
    return num_sequences * num_tokens * width * item_bytes(model)


def split_backward_bytes(
    model: ModelConfig,
    *,
    num_sequences: int,
    num_tokens: int,
    tensor: int,
    sequence: OnOff = "off",
    remat: Remat,
    key_ranks: int = 1,
) -> float:
    """Return the bytes that a layer stores in addition if its backward is split into input and weight gradient.

    The weight gradient of a product needs its input and its output gradient, which are stored until it runs. Output
    gradients reuse the buffers of residuals of their shape that only the input gradient reads (see
    `split_backward.py`). With remat "full" everything that the input gradient recomputed is stored, as much as with
    "dots". Where keys and values of several context ranks are kept, no residual has the shape of their gradients.
    """
    if has_own_classes(model):
        return num_sequences * _split_own_bytes(model, num_tokens=num_tokens, tensor=tensor, remat=remat)
    # Widths in elements per token on this device.
    t, d = tensor, model.hidden_size / (tensor if sequence == "on" else 1)
    own = attention_widths(model, tensor=t)
    whole = (own.latents + own.shared) * d / model.hidden_size
    # The input of the last product is recomputed from the activation function's output and, for SwiGLU, its factor.
    up = (2 if model.is_gated else 1) * model.ffn_size / t
    inputs, gradients = 2 * d + own.mixed + up + whole, 2 * d + own.projected + up + whole
    width = {
        "none": own.value if model.qk_norm != "off" else own.projected + whole,
        "dots": 2 * d + up,
        "full": inputs + gradients - d,
    }[remat]
    width += replaced_width(model, tensor=t, remat=remat) if key_ranks > 1 else 0
    return num_sequences * num_tokens * width * item_bytes(model)


def _split_own_bytes(model: ModelConfig, *, num_tokens: int, tensor: int, remat: Remat) -> float:
    """Return at most the bytes for one sequence with classes of the user's: output gradients, and inputs if "full"."""
    traced = trace_products(model, "", num_tokens=num_tokens, tensor=tensor)
    weights = [own for own in traced.products if own.is_weight]
    numbers = sum(own.count * own.batch * own.m * (own.n + (own.k if remat == "full" else 0)) for own in weights)
    return numbers * item_bytes(model)


def boundary_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of one microbatch's activation x[b, T, D] between two layers on one device."""
    split = layout.context * (layout.tensor if runtime.sequence_parallel == "on" else 1)
    return layout.sequences * num_tokens * model.hidden_size * item_bytes(model) / split


def _megatron_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes that Megatron stores of a layer: Korthikanti et al. 2022, equations 1 to 4.

    For a GPT in 16 bit without parallelism and with unfused attention they add up to s b h (34 + 5 a s / h), where s is
    the sequence, b the microbatch, h the hidden size and a the number of heads.
    """
    if layout.remat == "full":
        return boundary_bytes(model, layout=layout, runtime=runtime, num_tokens=num_tokens)
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    mask = 1 if runtime.dropout == "on" else 0
    t, own = layout.tensor, attention_widths(model, tensor=layout.tensor)
    num_up = 2 if model.is_gated else 1
    if layout.remat == "dots":
        # The layer's input and the outputs of products and of attention, but the last one.
        split = own.projected + own.mixed + num_up * model.ffn_size / t
        whole = 2 * model.hidden_size / (t if runtime.sequence_parallel == "on" else 1)
        return tokens * item * (whole + split)
    # In narrow formats the inputs of products are stored cast; that of the last one in attention besides its wide form.
    narrow = runtime.product_format
    cast = narrow.item_bytes if narrow.is_narrow else item
    # Inputs of both norms and of the products behind them, and two dropout masks.
    whole = tokens * model.hidden_size * (2 * item + 2 * cast + 2 * mask)
    if runtime.sequence_parallel == "on":
        whole /= t
    # Queries, keys, values and the core's output; inputs and output of the activation function.
    split = tokens * (item * (own.projected + own.mixed + num_up * model.ffn_size / t) + cast * model.ffn_size / t)
    split += tokens * cast * own.mixed if narrow.is_narrow else 0.0
    scores = tokens * num_tokens * model.num_heads / t
    if runtime.attention == "fused":
        core = tokens * model.num_heads / t * _FLOAT32
    elif layout.remat == "none":
        core = scores * (runtime.score_bytes * (2 if mask else 1) + mask)
    else:
        core = 0.0
    return whole + split + core
