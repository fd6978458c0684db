"""Every layer once more, written from its formula in plain jnp and run in float64: what the law is held against.

The law compares a mesh with one device, so a fault that both share passes it. Nothing here is used by a layer, nothing
here uses one. Shapes and names are those of the parameters of `trellax.layers`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from trellax.layers import ModelConfig

Params = dict[str, Any]


def in_float64(run: Callable[..., Any], *args: Any) -> Any:
    """Return run(*args) as numpy arrays, with every float in float64."""
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        wide = jax.tree.map(lambda leaf: leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf, args)
        return jax.tree.map(np.asarray, jax.jit(run)(*wide))


def vjp_in_float64(run: Callable[..., Any], params: Params, x: np.ndarray, cotangent: np.ndarray) -> Params:
    """Return the output, and the gradients of its product with `cotangent`: as `Probe.answer` has them."""

    def backward(params: Params, x: jax.Array, cotangent: jax.Array) -> Params:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            y, vjp = jax.vjp(lambda params: run(params, x), params)
            return {"y": y, "grads": vjp(cotangent)[0]}
        y, vjp = jax.vjp(run, params, x)
        grads, grad_x = vjp(cotangent)
        return {"y": y, "grads": grads, "x": grad_x}

    return in_float64(backward, params, x, cotangent)


def linear(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params.get("bias", 0.0)


def norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    if config.norm == "layernorm":
        x = x - jnp.mean(x, axis=-1, keepdims=True)
    return rms_norm(config, params, x) + params.get("bias", 0.0)


def rms_norm(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    return (
        x
        / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_epsilon)
        * (params["scale"] + (config.norm == "rmsnorm1p"))
    )


def rope_angles(config: ModelConfig, num_tokens: int) -> jax.Array:
    """The angle of each pair at each position, [T, H/2]; Llama 3.1's smoothing by wavelength."""
    frequencies = []
    for i in range(config.head_size // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_size)
        scaled, wavelength = frequency / config.rope_factor, 2 * np.pi / frequency
        if config.rope_scaling == "llama3":
            short = config.rope_original_tokens / config.rope_high_frequency_factor
            long = config.rope_original_tokens / config.rope_low_frequency_factor
            low, high = config.rope_low_frequency_factor, config.rope_high_frequency_factor
            smooth = (config.rope_original_tokens / wavelength - low) / (high - low)
            mixed = smooth * frequency + (1 - smooth) * scaled
            scaled = frequency if wavelength < short else scaled if wavelength > long else mixed
        if config.rope_scaling == "longrope":
            is_long = num_tokens > config.rope_original_tokens
            scaled = frequency / (config.rope_long_factors if is_long else config.rope_short_factors)[i]
        frequencies.append(scaled)
    return jnp.arange(num_tokens)[:, None] * jnp.asarray(frequencies)[None]


def rotate(config: ModelConfig, x: jax.Array) -> jax.Array:
    """x[B, T, N, H], each pair (i, i + H/2) as a complex number turned by its angle."""
    half = config.head_size // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * rope_angles(config, x.shape[1]))[None, :, None]
    if config.rope_scaling == "longrope":
        turned *= np.sqrt(1 + np.log(config.rope_factor) / np.log(config.rope_original_tokens))
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def cap(scores: jax.Array, most: float) -> jax.Array:
    return most * jnp.tanh(scores / most) if most else scores


def kind_of_layer(config: ModelConfig, layer: int) -> ModelConfig:
    """A config without a pattern whose attention is that of one layer."""
    kind = (config.attention_pattern or ("",))[layer % max(len(config.attention_pattern), 1)]
    own: dict[str, Any] = {"attention_pattern": (), "window_rope_theta": 0.0}
    if kind in ("full", "unrotated"):
        own["attention_window"] = 0
    if kind == "unrotated":
        own |= {"positions": "learned"}
    if kind == "window" and config.window_rope_theta:
        own |= {"rope_theta": config.window_rope_theta, "rope_scaling": "none", "rope_factor": 1.0}
    return replace(config, **own)


def attention(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    num_sequences, num_tokens, _ = x.shape
    heads = (num_sequences, num_tokens, -1, config.head_size)
    flat = {name: linear(params[name], x) for name in ("query", "key", "value")}
    if config.qk_norm == "whole":
        flat |= {name: rms_norm(config, params[f"{name}_norm"], flat[name]) for name in ("query", "key")}
    q, k, v = (leaf.reshape(heads) for leaf in flat.values())
    if config.qk_norm == "on":
        q, k = rms_norm(config, params["query_norm"], q), rms_norm(config, params["key_norm"], k)
    if config.positions == "rotary":
        q, k = rotate(config, q), rotate(config, k)
    k, v = (jnp.repeat(leaf, config.num_heads // config.num_kv_heads, axis=2) for leaf in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (config.attention_scale or config.head_size**-0.5)
    scores = cap(scores, config.attention_softcap)
    behind = jnp.arange(num_tokens)[:, None] - jnp.arange(num_tokens)[None]
    is_seen = (behind >= 0) & (behind < (config.attention_window or num_tokens))
    scores = jnp.where(is_seen[None, None], scores, -jnp.inf)
    if config.attention_sinks == "on":
        # One key more, whose value is left out.
        sinks = jnp.broadcast_to(params["sinks"][None, :, None, None], (*scores.shape[:3], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    shares = jax.nn.softmax(scores, axis=-1)[..., :num_tokens]
    return linear(params["out"], jnp.einsum("bnts,bsnh->btnh", shares, v).reshape(num_sequences, num_tokens, -1))


def mlp(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    up = linear(params["up"], x)
    if config.mlp == "swiglu":
        gate = linear(params["gate"], x)
        return linear(params["down"], gate / (1 + jnp.exp(-gate)) * up)
    if config.mlp == "clamped_swiglu":
        gate, up = jnp.minimum(linear(params["gate"], x), 7.0), jnp.clip(up, -7.0, 7.0)
        return linear(params["down"], gate / (1 + jnp.exp(-1.702 * gate)) * (up + 1))
    if config.mlp == "geglu":
        return linear(params["down"], jax.nn.gelu(linear(params["gate"], x)) * up)
    # GPT-2's GELU is the approximation by tanh (Hendrycks and Gimpel 2016, section 2).
    inner = jnp.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))
    return linear(params["down"], 0.5 * up * (1 + inner))


def block(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    for layer, run in (("attention", attention), ("mlp", mlp)):
        y = norm(config, params[f"{layer}_norm"], x) if config.norm_place != "after" else x
        y = run(config, params[layer], y)
        y = norm(config, params[f"{layer}_out_norm"], y) if config.norm_place != "before" else y
        x = x + config.residual_scale * y
    return x


def embedding(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    x = params["table"][tokens] * config.embedding_scale
    return x + params["positions"][None, : tokens.shape[1]] if config.positions == "learned" else x


def transformer(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits [B, T, V]."""
    x = embedding(config, params["embed"], tokens)
    for index in range(config.num_layers):
        x = block(kind_of_layer(config, index), jax.tree.map(lambda leaf, i=index: leaf[i], params["blocks"]), x)
    table = params["head"].get("table", params["embed"]["table"])
    return cap(norm(config, params["head"]["norm"], x) @ table.T * config.logit_scale, config.logit_softcap)


def loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    own = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    return -(weights * own).sum()
