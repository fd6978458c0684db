"""Attention is its definition, and heads may be split or copied over devices without changing it."""

from functools import cache
from typing import Any

import numpy as np
import pytest
from flax import nnx
from trellax.layers import Attention, ModelConfig, model_rules

from .sharded import Probe, collectives, differing, mesh_of, normal, small_config

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
    query, key, value = (linear(name, x) for name in ("query", "key", "value"))
    mixed = np.zeros((*x.shape[:2], config.query_size))
    for b, n, t in np.ndindex(x.shape[0], config.num_heads, x.shape[1]):
        own, kv = slice(n * h, (n + 1) * h), slice(n // share * h, (n // share + 1) * h)
        scores = key[b, : t + 1, kv] @ query[b, t, own] / np.sqrt(h)
        weights = np.exp(scores - scores.max())
        mixed[b, t, own] = weights / weights.sum() @ value[b, : t + 1, kv]
    return linear("out", mixed)


@pytest.mark.parametrize("kv", KV_HEADS)
def test_attention_is_its_definition(kv: str) -> None:
    config = small_config(num_kv_heads=KV_HEADS[kv], head_size=8)
    attention = probe(config)
    assert differing(attention.answer(X)["y"], by_definition(config, attention.params, X)) == {}


@pytest.mark.parametrize(("style", "kv", "mesh"), CASES)
def test_attention_on_any_mesh_matches_one_device(style: str, kv: str, mesh: str) -> None:
    split = probe(small_config(style, num_kv_heads=KV_HEADS[kv]), mesh=mesh)
    assert differing(split.answer(X, mesh=mesh_of(mesh)), one_device(style, kv)) == {}


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
    assert [(one.kind, one.shape) for one in found] == [("all-reduce", (B, T, D))]
