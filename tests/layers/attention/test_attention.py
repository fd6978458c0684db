"""Attention is its definition, and heads may be split or copied over devices without changing it."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from flax import nnx
from trellax.layers import Attention, ModelConfig, model_rules

from ..sharded import Probe, collectives, differing, mesh_of, normal, small_config

B, T, D = 4, 16, 32
X = normal(B, T, D)
KV_HEADS = {"multi_head": 8, "grouped": 2, "multi_query": 1}
CASES = [  # key/value heads split evenly, copied twice, copied to all; both kinds of positions
    ("gpt", "multi_head", "tensor=8"),
    ("gpt", "grouped", "tensor=4"),
    ("gpt", "multi_query", "data=2,tensor=4"),
    ("llama", "multi_head", "data=4,tensor=2"),
    ("llama", "grouped", "tensor=2"),
    ("llama", "grouped", "tensor=8"),
    ("llama", "multi_query", "tensor=2"),
    ("qwen", "grouped", "tensor=2"),
    ("qwen", "multi_query", "data=2,tensor=4"),
]


def probe(config: ModelConfig, *, mesh: str = "tensor=1") -> Probe:
    rules = model_rules(config, mesh_of(mesh).shape)
    return Probe.of(lambda: Attention(config, rngs=nnx.Rngs(0), rules=rules), rules=rules)


@cache
def one_device(style: str, kv: str) -> dict[str, Any]:
    return probe(small_config(style, num_kv_heads=KV_HEADS[kv])).answer(X)


def by_definition(config: ModelConfig, params: dict[str, Any], x: np.ndarray) -> np.ndarray:
    """One head and one query at a time, in float64 numpy."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ params[name]["kernel"].astype(np.float64) + params[name].get("bias", 0)

    h, share = config.head_size, config.num_heads // config.num_kv_heads

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        if name not in params:
            return x
        heads = x.reshape(*x.shape[:2], -1, h)
        root = np.sqrt((heads**2).mean(-1, keepdims=True) + config.norm_epsilon)
        return (heads / root * params[name]["scale"]).reshape(x.shape)

    query, key, value = (linear(name, x) for name in ("query", "key", "value"))
    query, key = norm("query_norm", query), norm("key_norm", key)
    mixed = np.zeros((*x.shape[:2], config.query_size))
    for b, n, t in np.ndindex(x.shape[0], config.num_heads, x.shape[1]):
        own, kv = slice(n * h, (n + 1) * h), slice(n // share * h, (n // share + 1) * h)
        seen = slice(max(0, t + 1 - config.attention_window) if config.attention_window else 0, t + 1)
        scores = key[b, seen, kv] @ query[b, t, own] / np.sqrt(h)
        weights = np.exp(scores - scores.max())
        mixed[b, t, own] = weights / weights.sum() @ value[b, seen, kv]
    return linear("out", mixed)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"attention_window": 5},
    "window_of_one": {"attention_window": 1},
    "window_past_the_end": {"attention_window": 100},
    "qk_norm": {"qk_norm": "on", "norm_epsilon": 0.1},
    "qkv_bias": {"bias": "qkv"},
}


@pytest.mark.parametrize("kv", KV_HEADS)
@pytest.mark.parametrize("feature", FEATURES)
def test_attention_is_its_definition(feature: str, kv: str) -> None:
    config = small_config(num_kv_heads=KV_HEADS[kv], head_size=8, **FEATURES[feature])
    attention = probe(config)
    assert differing(attention.answer(X)["y"], by_definition(config, attention.params, X)) == {}


@pytest.mark.parametrize(("style", "kv", "mesh"), CASES)
def test_attention_on_any_mesh_matches_one_device(style: str, kv: str, mesh: str) -> None:
    split = probe(small_config(style, num_kv_heads=KV_HEADS[kv]), mesh=mesh)
    assert differing(split.answer(X, mesh=mesh_of(mesh)), one_device(style, kv)) == {}


def test_bias_of_queries_keys_and_values_alone() -> None:
    attention = probe(small_config("qwen"))
    assert {name for name, layer in attention.params.items() if "bias" in layer} == {"query", "key", "value"}


def test_projection_at_given_positions_is_that_of_the_whole_sequence() -> None:
    attention = nnx.merge(probe(config := small_config("qwen", num_kv_heads=2)).graph, probe(config).params)
    order = np.stack([np.roll(np.arange(T), b) for b in range(B)])
    moved = attention.project(np.take_along_axis(X, order[..., None], axis=1), positions_BT=order)
    for name, whole, part in zip("qkv", attention.project(X), moved, strict=True):
        assert differing({name: part}, {name: np.take_along_axis(whole, order[..., None, None], axis=1)}) == {}


def test_no_token_sees_a_later_one() -> None:
    attention = probe(small_config("llama"))
    changed = X.copy()
    changed[:, 9:] = normal(B, T - 9, D, seed=5)
    before, after = (attention.answer(x)["y"] for x in (X, changed))
    assert differing(after[:, :9], before[:, :9]) == {}
    assert np.abs(after[:, 9:] - before[:, 9:]).max() > 0.01


@pytest.mark.parametrize("kv", KV_HEADS)
def test_attention_costs_one_all_reduce_forward(kv: str) -> None:
    config, mesh = small_config(num_kv_heads=KV_HEADS[kv]), "tensor=4"
    found = collectives(probe(config, mesh=mesh).program(X, mesh=mesh_of(mesh)))
    assert [(one.kind, one.shape) for one in found] == [("all-reduce", (B * T, D))]
