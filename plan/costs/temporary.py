"""Count what a step needs for a while: the loss, one layer's backward, and copies of the weights.

The loss and a layer's backward are never at work together, so the larger one counts. Of trellax's programs the arrays
are those that XLA holds at its peak, read in programs for H200 (`../../benchmarks/memory`). Read `memory_model.py`
first.
"""

from dataclasses import replace
from typing import Any

from ...layers import ModelConfig
from ...layers.attention_counts import attention_widths
from ...layers.projected_loss import chunk_tokens
from .activations import layer_activation_bytes
from .device_params import End, block_params, vocabulary_params
from .held_layers import KindCounts
from .layout import Layout
from .operations import item_bytes
from .runtime import Runtime

_FLOAT32 = 4


def temporary_bytes(
    model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int, ends: tuple[End, ...]
) -> float:
    """Return the larger of the loss, on a rank where the head runs, and one layer's backward."""
    given: dict[str, Any] = {"layout": layout, "runtime": runtime, "num_tokens": num_tokens}
    has_head = "head" in ends or _is_vocab_split(layout, runtime)
    loss = _loss_bytes(model, **given) if has_head else 0.0
    once = 0.0
    if layout.remat != "none":
        # While a layer's backward runs, its recomputed residuals are all in memory, for one layer at a time.
        kept = replace(layout, remat="none")
        once = layer_activation_bytes(model, layout=kept, runtime=runtime, num_tokens=num_tokens)
    return max(loss, once) + runtime.workspace_bytes


def _is_vocab_split(layout: Layout, runtime: Runtime) -> bool:
    return runtime.vocab == "split" and layout.pipe > 1


def _loss_bytes(model: ModelConfig, *, layout: Layout, runtime: Runtime, num_tokens: int) -> float:
    """Return the bytes of logits and what is made of them, and of what is alive beside them.

    trellax has the logits of a chunk in float32 and their gradient, the table in the compute dtype and its gradient,
    and x with its gradient, both of all tokens (`../../layers/projected_loss.py`).
    """
    tokens, item = layout.sequences * num_tokens / layout.context, item_bytes(model)
    held = min(tokens, chunk_tokens(model.hidden_size)) if runtime.logits == "chunked" else tokens
    words = model.vocab_size / layout.tensor
    if _is_vocab_split(layout, runtime):
        words /= layout.pipe
    if runtime.residuals == "trellax":
        return (held * words + words * model.hidden_size + tokens * model.hidden_size) * (_FLOAT32 + item)
    # Logits in float32, and their gradient in the compute dtype, are left when the last layer's backward runs.
    left = held * words * (_FLOAT32 + item) + _backward_bytes(model, layout=layout, tokens=tokens)
    return max(held * words * runtime.loss_bytes, left)


def gathered_tables(model: ModelConfig, *, layout: Layout, runtime: Runtime) -> float:
    """Return the numbers of embedding and head on a device where they are gathered over data, once a step; else 0."""
    if layout.zero < 2 and layout.fsdp == 1:
        return 0.0
    tables = vocabulary_params(model, tensor=layout.tensor)[0]
    return tables / (layout.pipe if _is_vocab_split(layout, runtime) else 1)


def copied_bytes(layers: KindCounts, *, layout: Layout) -> float:
    """Return the bytes of weight copies of all layers, and of the one at work where each gathers its own."""
    copies = [(count, *_layer_copies(kind, layout=layout)) for kind, count in layers]
    return sum(count * each for count, each, _ in copies) + max(at_work for _, _, at_work in copies)


def _layer_copies(model: ModelConfig, *, layout: Layout) -> tuple[float, float]:
    """Return the bytes of weight copies that a step makes once: cast to 16 bits, or joined if columns are split.

    They are those of one layer between its uses, and while it is at work.
    """
    # Gathered by every layer: a part of all layers, and the layer at work.
    parts = layout.replicas if layout.zero == 3 else 1
    own = item_bytes(model) * block_params(model, tensor=layout.tensor, expert=layout.expert)
    at_work = own if layout.zero == 3 else 0.0
    if item_bytes(model) < _FLOAT32 or layout.zero == 2:
        return own / parts, at_work
    if layout.tensor == 1:
        return 0.0, at_work
    # What reads latent vectors is not joined.
    columns = 0.0 if model.latent_size else attention_widths(model, tensor=layout.tensor).projected
    columns += 2 * model.ffn_size / layout.tensor if model.mlp == "swiglu" else 0.0
    return _FLOAT32 * model.hidden_size * columns / parts, at_work


def _backward_bytes(model: ModelConfig, *, layout: Layout, tokens: float) -> float:
    """Return the bytes of the feed-forward's gradients and of its largest weight gradient, in float32, before the sum.

    Both are alive together with the logits in the first backward of a microbatch, as 14 peaks on B200 show
    (simumax_b200_a100.toml).
    """
    num_up = 2 if model.mlp == "swiglu" else 1
    features = model.ffn_size / layout.tensor
    gradients = tokens * item_bytes(model) * (num_up + 1) * features
    return gradients + _FLOAT32 * num_up * features * model.hidden_size
