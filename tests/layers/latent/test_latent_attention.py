"""Attention from latent vectors is its definition, on one device and with heads split."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ModelConfig, NewTokens, model_rules
from trellax.layers.attention import cache as cache_module
from trellax.layers.attention.cache import KVCache
from trellax.layers.latent.absorbed import attend_latents
from trellax.layers.latent.attention import LatentAttention
from trellax.meshes import ModelError

from ..sharded import Probe, collectives, differing, mesh_of, normal, small_config

B, T, D, H, R, U, C = 4, 16, 32, 12, 4, 6, 24
X = normal(B, T, D)
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 8, "rope_mscale_all": 0.5}
YARN |= {"rope_high_frequency_factor": 2.0, "rope_attention_factor": 1.25}


def latents(*, queries: int = 16, **more: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"head_size": H, "rope_head_size": R, "value_head_size": U, "latent_size": C}
    return small_config("llama", **sizes, query_latent_size=queries, norm_epsilon=0.1, **more)


def probe(config: ModelConfig, *, mesh: str = "tensor=1") -> Probe:
    rules = model_rules(config, mesh_of(mesh).shape)
    return Probe.of(lambda: LatentAttention(config, rngs=nnx.Rngs(0), rules=rules), rules=rules)


def turned(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """x[B, T, ..., R], each pair (2i, 2i + 1) as a complex number turned by its angle."""
    own = config.rope_theta ** -(np.arange(0, R, 2) / R)
    magnitude = 1.0
    if config.rope_scaling == "yarn":
        # The first of two pairs turns 1.3 times in 8 tokens, the second hardly.
        own, magnitude = own * np.array([1, 1 / 4]), config.rope_attention_factor
    angles = np.arange(x.shape[1])[:, None] * own
    spin = (magnitude * np.exp(1j * angles)).reshape(1, x.shape[1], *[1] * (x.ndim - 3), R // 2)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * spin
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def by_definition(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """As in DeepSeek-V2's equations 9 to 19, one head at a time, in float64 numpy."""

    def linear(tree: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return x @ tree["kernel"].astype(np.float64)

    def norm(tree: dict[str, Any], x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * tree["scale"]

    query = params["query"]
    q = linear(query["up"], norm(query["norm"], linear(query["down"], x))) if "up" in query else linear(query, x)
    down = linear(params["latent_down"], x)
    kv = linear(params["key_value"], norm(params["latent_norm"], down[..., :C]))
    shared = turned(config, down[..., C:])
    q, kv = (leaf.reshape(*x.shape[:2], config.num_heads, -1) for leaf in (q, kv))
    scale = H**-0.5 * ((0.1 * 0.5 * np.log(4) + 1) ** 2 if config.rope_scaling == "yarn" else 1)
    behind = np.arange(T)[:, None] - np.arange(T)[None]
    is_seen = (behind >= 0) & (behind < (config.attention_window or T))
    heads = []
    for n in range(config.num_heads):
        own_q = np.concatenate([q[:, :, n, : H - R], turned(config, q[:, :, n, H - R :])], axis=-1)
        own_k = np.concatenate([kv[:, :, n, : H - R], shared], axis=-1)
        scores = np.where(is_seen, own_q @ own_k.swapaxes(1, 2) * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ kv[:, :, n, H - R :])
    return linear(params["out"], np.concatenate(heads, axis=-1))


@pytest.mark.parametrize("more", [{}, {"queries": 0}, {"attention_window": 5}, YARN], ids=str)
def test_attention_is_its_definition(more: dict[str, Any]) -> None:
    attention = probe(config := latents(**more))
    assert differing(attention.answer(X)["y"], by_definition(config, attention.params, X)) == {}


@pytest.mark.parametrize(("mesh", "queries"), [("tensor=8", 16), ("data=2,tensor=4", 0)])
def test_attention_on_any_mesh_matches_one_device(mesh: str, queries: int) -> None:
    config = latents(queries=queries)
    assert differing(probe(config, mesh=mesh).answer(X, mesh=mesh_of(mesh)), probe(config).answer(X)) == {}


def test_attention_costs_one_all_reduce_forward() -> None:
    found = collectives(probe(latents(), mesh="tensor=4").program(X, mesh=mesh_of("tensor=4")))
    assert [(one.kind, one.shape) for one in found] == [("all-reduce", (B * T, D))]


def test_absorbed_queries_give_what_keys_and_values_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """From pages of four tokens that lie anywhere, two of them a block, and NaN in all that is not in use."""
    monkeypatch.setattr(cache_module, "BLOCK", 8)
    drawn = normal(B, T, 8, H), normal(B, T, R, seed=1), normal(B, T, C, seed=2), normal(C, 8, H - R + U)
    q, shared, latent, kernel = map(jnp.asarray, drawn)
    made = jnp.einsum("bsc,cne->bsne", latent, kernel)
    keys = jnp.concatenate([made[..., : H - R], jnp.broadcast_to(shared[:, :, None], (B, T, 8, R))], axis=-1)
    scores = jnp.einsum("btnh,bsnh->bnts", q, keys) / H**0.5
    shares = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], scores, -jnp.inf), axis=-1)
    expected = jnp.einsum("bnts,bsnu->btnu", shares, made[..., H - R :])
    pages = jnp.asarray(np.random.default_rng(0).permutation(B * 7).reshape(B, 7))
    empty = (jnp.full((1, B * 7, 1, 4, size), jnp.nan) for size in (R, C))
    cache = KVCache(keys=next(empty), values=next(empty), lengths=None)
    found = []
    for start, end in ((0, 6), (6, 7), (7, T)):
        new = NewTokens(row=0, starts=jnp.full(B, start), counts=jnp.full(B, end - start), pages=pages)
        cache = cache.append(0, new, shared[:, start:end, None], latent[:, start:end, None])
        found.append(attend_latents(q[:, start:end], kernel, cache=cache, layer=0, new=new))
    assert differing(jnp.concatenate(found, axis=1), expected) == {}


MISTAKES: dict[str, dict[str, Any]] = {
    "negative": {"latent_size": -1},
    "values_without_latents": {"latent_size": 0, "query_latent_size": 0},
    "queries_without_latents": {"latent_size": 0, "value_head_size": 0},
    "bias": {"bias": "qkv"},
    "qk_norm": {"qk_norm": "on"},
    "learned_positions": {"positions": "learned", "rope_head_size": 0},
    "key_heads": {"num_kv_heads": 2},
    "rotated_whole": {"rope_head_size": 12},
    "fp8": {"matmuls": "fp8"},
    "rotated_too_much": {"rope_head_size": 14},
    "rotated_odd": {"rope_head_size": 3},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_contradiction_is_refused_with_its_numbers(name: str, golden: Any) -> None:
    sizes: dict[str, Any] = {"head_size": H, "rope_head_size": R, "value_head_size": U, "latent_size": C}
    with pytest.raises(ModelError) as caught:
        small_config("llama", **(sizes | {"query_latent_size": 16} | MISTAKES[name]))
    golden(f"errors/layers/latents_{name}.txt", str(caught.value))
