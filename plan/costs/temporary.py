"""Count what a step needs for a while: the loss, one layer's backward, and copies of the weights.

The loss and a layer's backward are never at work together, so the larger one counts. Of trellax's programs the arrays
are those that XLA holds at its peak, read in programs for H200 (`../../benchmarks/memory`). Read `memory_model.py`
first.
"""

from dataclasses import dataclass, replace
from typing import Any

from ...layers import ModelConfig
from ...layers.attention.blockwise import row_blocks
from ...layers.attention.counts import attention_widths
from ...layers.projected_loss import chunk_tokens
from .activations import boundary_bytes, layer_activation_bytes
from .device_params import End, block_matrices, block_params, device_words, expert_matrices, frozen_item_bytes
from .held_layers import KindCounts
from .layout import Layout
from .operations import item_bytes
from .runtime import Runtime

_FLOAT32 = 4


def temporary_bytes(
    model: ModelConfig,
    *,
    layout: Layout,
    runtime: Runtime,
    num_tokens: int,
    ends: tuple[End, ...],
    gradients: float,
) -> float:
    """Return the larger of the loss, on a rank where the head runs, and one layer's backward.

    Args:
        gradients: bytes of those of the layers, which are counted elsewhere, and in a step of one microbatch are made
            after the loss.
    """
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens}
    has_head = "head" in ends or _is_vocab_split(layout, runtime)
    if runtime.residuals == "trellax":
        loss = _loss_bytes(model, **given) if has_head else 0.0
    else:
        loss = _megatron_loss_bytes(model, **given, has_head=has_head)
    once = _layer_work(model, **given)
    if runtime.residuals == "trellax" and layout.zero == 3:
        # A layer's gradients are whole, in float32, before they are split over data.
        once += _FLOAT32 * block_matrices(model, tensor=layout.tensor, expert=layout.expert) if layout.pipe > 1 else 0.0
        # To gather ahead XLA takes the last layer out of the loop: its residuals are there besides, as they were made.
        loss += layer_activation_bytes(model, **given) if layout.pipe == 1 else 0.0
    if runtime.residuals == "trellax" and layout.pipe == 1:
        if layout.microbatches == 1:
            loss -= gradients
        elif layout.tensor > 1 or layout.zero == 3:
            # XLA adds the gradient of the head's table to its sum when the layers are done.
            once += _FLOAT32 * device_words(model, layout=layout, runtime=runtime) * model.hidden_size
    return max(loss, once) + runtime.workspace_bytes


def _layer_work(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes that a layer's backward has at once beside what is kept of it.

    Megatron's are its recomputed residuals. trellax has the gradients of the feed-forward's inputs and outputs besides,
    which XLA writes together.
    """
    if runtime.residuals != "trellax" and layout.remat == "none":
        return 0.0
    given: dict[str, Any] = {"runtime": runtime, "num_tokens": num_tokens}
    # What magnitudes scale is kept already; one more of these arrays waits for their gradient (one program's total).
    has_magnitudes = model.lora_magnitude == "on"
    model = replace(model, lora_magnitude="off")
    whole = layer_activation_bytes(model, layout=replace(layout, remat="none"), **given)
    if runtime.residuals != "trellax":
        return whole
    recomputed = whole - layer_activation_bytes(model, layout=replace(layout, schedule="1f1b"), **given)
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    features = (model.shared_size if model.num_experts else model.ffn_size) / layout.tensor
    num_up = 2 if model.is_gated else 1
    # Where the feed-forward is computed again, no gradient of a frozen kernel waits for its inner values (one program's
    # total).
    num_inner = num_up if runtime.adapter_rank and layout.remat == "full" else num_up + 1
    gradients = item * tokens * (num_inner + has_magnitudes) * features
    gradients += boundary_bytes(model, layout=layout, **given)
    if layout.tensor > 1 and runtime.sequence_parallel == "on":
        # Of all tokens: the inputs of attention and of the feed-forward, the gradient that enters, and the one that
        # leaves before its sum.
        gradients += 4 * item * tokens * model.hidden_size
    if layout.remat == "full":
        gradients += score_bytes(model, layout=layout, runtime=runtime, num_tokens=num_tokens)
    return recomputed + gradients + _round_bytes(model, layout=layout, tokens=round(tokens))


def score_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of the scores of all blocks, in float32, where a layer's forward and backward are in one body.

    XLA merges what the backward recomputes of a block with the forward, so all are kept. Fused kernels have none.
    """
    if runtime.attention == "fused":
        return 0.0
    blocks = sum((rows.stop - rows.start) * rows.stop for rows in row_blocks(num_tokens))
    return _FLOAT32 * layout.sequences * model.num_heads / layout.tensor * blocks / layout.context**2


def _round_bytes(model: ModelConfig, *, layout: Layout, tokens: int) -> float:
    """Return the bytes of the backward of experts beside the residuals of one round that are recomputed.

    The loop of further rounds has residuals and gradients of its own, six arrays of rows of the model's width and the
    features' gradients, before the backward of the first round begins. Beside them are kernels in the layout of the
    backward, and their gradients.
    """
    if not model.num_experts:
        return 0.0
    item, num_up = item_bytes(model), 2 if model.is_gated else 1
    d, f = model.hidden_size, model.expert_size / layout.tensor
    capacity, features = model.expert_rows(tokens), (num_up + 1) * f
    rows = model.num_experts * capacity
    kernels = expert_matrices(model, tensor=layout.tensor, expert=layout.expert)
    if model.expert_overflow == "drop" or capacity >= tokens:
        return item * (rows * (2 * d + features) + kernels)
    # Full rematerialization counts the rows of one round, in and out, and its features as recomputed; others keep most.
    further = 4 * d if layout.remat == "full" else 6 * d + num_up * f
    return item * (rows * further + 3 * kernels)


def _is_vocab_split(layout: Layout, runtime: Runtime) -> bool:
    return runtime.vocab == "split" and layout.pipe > 1


def _loss_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of trellax's loss (`../../layers/projected_loss.py`).

    Logits of a chunk in float32 and their gradient, the table in the compute dtype and its gradient, and x with its
    gradient, both of all tokens.
    """
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    held, words = min(tokens, chunk_tokens(model.hidden_size)), device_words(model, layout=layout, runtime=runtime)
    both, d = _FLOAT32 + item, model.hidden_size
    if runtime.adapter_rank:
        # A frozen table is kept in the compute dtype, and has no gradient.
        chunk = words * held * both
    elif _is_one_microbatch(layout):
        # The table's gradient is counted as the step's.
        chunk = words * (held * both + d * item)
    elif held < tokens:
        chunk = words * (held + d) * both
    else:
        # Without a loop over chunks logits are used up before the table's gradient is made.
        chunk = words * max(held * both + d * item, held * item + d * both)
    return chunk + tokens * d * both


def _megatron_loss_bytes(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int, has_head: bool
) -> float:
    """Return the bytes of Megatron's loss, or of what is left of it when the last layer's backward runs.

    Logits in float32, and their gradient in the compute dtype, are left then.
    """
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    held = min(tokens, chunk_tokens(model.hidden_size)) if runtime.logits == "chunked" else tokens
    logits = held * device_words(model, layout=layout, runtime=runtime) if has_head else 0.0
    left = logits * (_FLOAT32 + item) + _backward_bytes(model, layout=layout, tokens=tokens)
    return max(logits * runtime.loss_bytes, left)


@dataclass(frozen=True, kw_only=True)
class TableBytes:
    """Bytes of embedding and head in float32 on a device, beside its own part: gathered copies, and their gradients."""

    copies: float
    gradients: float


def gathered_tables(model: ModelConfig, *, layout: Layout, runtime: Runtime) -> TableBytes:
    """Return the bytes of the tables where they are gathered over data once a step, as weights of layers may not be.

    Their gradients are whole until the step ends, those of layers that gather their own are split as they are made. In
    a step of one microbatch nothing waits: tables are read in the compute dtype, and the embedding's gradient is made
    last.
    """
    is_gathered = layout.zero >= 2 or layout.fsdp > 1
    if runtime.residuals != "trellax" or not is_gathered:
        return TableBytes(copies=0.0, gradients=0.0)
    num_tables = 1 if model.embeddings == "tied" else 2
    whole = _FLOAT32 * num_tables * model.hidden_size * device_words(model, layout=layout, runtime=runtime)
    rest = whole * (1 - 1 / (layout.replicas * layout.context)) if layout.zero != 2 else 0.0
    if _is_one_microbatch(layout):
        return TableBytes(copies=0.0, gradients=rest / num_tables)
    return TableBytes(copies=whole, gradients=rest)


def _is_one_microbatch(layout: Layout) -> bool:
    return layout.pipe == 1 and layout.microbatches == 1


def copied_bytes(layers: KindCounts, *, layout: Layout) -> float:
    """Return the bytes of weight copies of all layers that a step makes once: cast to 16 bits, or joined if split."""
    return sum(count * _layer_copies(kind, layout=layout) for kind, count in layers)


def _layer_copies(model: ModelConfig, *, layout: Layout) -> float:
    split = {"tensor": layout.tensor, "expert": layout.expert}
    experts = expert_matrices(model, **split)
    rest, item = block_params(model, **split) - experts, item_bytes(model)
    item = sum(frozen_item_bytes(model)) if model.lora_base == "nf4" else item
    # Where every layer gathers its own a device has the copies of its part; other experts along expert split no more.
    parts = layout.replicas * layout.context if layout.zero == 3 else 1
    # Frozen weights are kept in the compute dtype.
    if (item < _FLOAT32 and not model.lora_rank) or layout.zero == 2:
        return item * (rest + experts * (layout.expert if layout.zero == 3 else 1)) / parts
    if layout.tensor == 1:
        return 0.0
    # What reads latent vectors is not joined.
    columns = 0.0 if model.latent_size else attention_widths(model, tensor=layout.tensor).projected
    columns += 2 * model.ffn_size / layout.tensor if model.is_gated else 0.0
    return (item if model.lora_rank else _FLOAT32) * model.hidden_size * columns / parts


def _backward_bytes(model: ModelConfig, *, layout: Layout, tokens: float) -> float:
    """Return the bytes of the feed-forward's gradients and of its largest weight gradient, in float32, before the sum.

    Both are alive together with the logits in the first backward of a microbatch, as 14 peaks on B200 show
    (simumax_b200_a100.toml).
    """
    num_up = 2 if model.is_gated else 1
    features = model.ffn_size / layout.tensor
    gradients = tokens * item_bytes(model) * (num_up + 1) * features
    return gradients + _FLOAT32 * num_up * features * model.hidden_size
