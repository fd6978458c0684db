"""Count the weights of attention and the width of its arrays, whether keys and values come from x or from latents.

Read `counts.py` next, which counts whole layers.
"""

from dataclasses import dataclass

from ..config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class AttentionWidths:
    """Features of attention's arrays for one token, on one device of tensor.

    query, key, value: of its heads, as they enter scores and sums; mixed: what its heads return.
    projected: all three as products with weights make them, without copies of a shared key for each head.
    entered: features that are gathered over tensor, or whose gradients are summed over it, to compute the heads.
    latents: vectors that are normalized, of keys and values and of queries; shared: the key features that heads share.
    """

    query: int
    key: int
    value: int
    mixed: int
    projected: int
    entered: int
    latents: int = 0
    shared: int = 0


def attention_widths(config: ModelConfig, *, tensor: int = 1) -> AttentionWidths:
    """Return the widths of a model's attention where heads are split over `tensor` devices."""
    query, d = config.query_size // tensor, config.hidden_size
    if not config.latent_size:
        # A device has the key/value heads that its queries use, one at least.
        kv = max(config.kv_size // tensor, config.head_size)
        return AttentionWidths(query=query, key=kv, value=kv, mixed=query, projected=query + 2 * kv, entered=d)
    latents, value = config.latent_size + config.query_latent_size, config.value_size // tensor
    return AttentionWidths(
        query=query,
        key=query,
        value=value,
        mixed=value,
        projected=2 * query + value - config.num_heads // tensor * config.rope_head_size,
        entered=config.latent_size + config.rope_head_size + (config.query_latent_size or d),
        latents=latents,
        shared=config.rope_head_size,
    )


def attention_products(config: ModelConfig, *, tensor: int = 1) -> tuple[tuple[int, int], ...]:
    """Return the products with weights, (features in, features out) on one device of tensor, of its own columns."""
    d, widths = config.hidden_size, attention_widths(config, tensor=tensor)
    out = (widths.mixed, d)
    if not config.latent_size:
        return (d, widths.projected), out
    queries = config.query_latent_size
    down = (d, config.latent_size + widths.shared + queries)
    return down, (queries or d, widths.query), (config.latent_size, widths.projected - widths.query), out


def attention_weights(config: ModelConfig, *, tensor: int = 1) -> int:
    """Return the number of weights of attention on one device; key and value heads fewer than `tensor` are whole."""
    if config.latent_size:
        return sum(rows * columns for rows, columns in attention_products(config, tensor=tensor))
    split_kv = tensor if config.num_kv_heads % tensor == 0 else 1
    return config.hidden_size * (2 * config.query_size // tensor + 2 * config.kv_size // split_kv)


def attention_vectors(config: ModelConfig, *, tensor: int = 1) -> int:
    """Return the number of sinks, and of scales of norms, within attention on one device; those of one head are whole.

    Sinks are split as the heads are.
    """
    split_kv = tensor if config.num_kv_heads % tensor == 0 else 1
    whole = config.query_size // tensor + config.kv_size // split_kv
    heads = {"on": 2 * config.head_size, "whole": whole, "off": 0}[config.qk_norm]
    sinks = config.num_heads // tensor if config.attention_sinks == "on" else 0
    return heads + sinks + attention_widths(config).latents
