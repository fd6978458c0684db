"""Norms are their formulas, and applying one keeps nothing but its input."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from trellax.layers.norms import make_norm, normalize

from .sharded import STYLES, Probe, differing, mesh_of, normal, small_config

X = 3 * normal(2, 4, 32) + 1


def formula(params: dict[str, Any], x: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    if "bias" in params:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x * params["scale"] + params.get("bias", 0)


@pytest.mark.parametrize("style", STYLES)
def test_norm_is_its_formula(style: str) -> None:
    norm = Probe.of(lambda: make_norm(small_config(style, norm_epsilon=0.1), rngs=nnx.Rngs(0)))
    assert differing(norm.answer(X)["y"], formula(norm.params, X, 0.1)) == {}


@pytest.mark.parametrize("style", STYLES)
def test_norm_on_a_mesh_matches_one_device(style: str) -> None:
    norm = Probe.of(lambda: make_norm(small_config(style), rngs=nnx.Rngs(0)))
    assert differing(norm.answer(X, mesh=mesh_of("data=2,tensor=4")), norm.answer(X)) == {}


def test_layernorm_without_biases_has_a_scale_alone() -> None:
    norm = nnx.eval_shape(lambda: make_norm(small_config(bias="off"), rngs=nnx.Rngs(0)))
    assert list(nnx.to_pure_dict(nnx.state(norm))) == ["scale"]


def test_statistics_are_float32_when_computing_in_bfloat16() -> None:
    norm = Probe.of(lambda: make_norm(small_config("llama", dtype="bfloat16"), rngs=nnx.Rngs(0)))
    program = str(jax.make_jaxpr(norm.forward)(norm.params, X.astype("bfloat16")))
    sums = [line for line in program.splitlines() if "reduce_sum" in line]
    assert len(sums) == 1
    assert "f32" in sums[0]


def test_applying_a_norm_keeps_its_input_and_scale_alone() -> None:
    norm = Probe.of(lambda: make_norm(small_config("llama"), rngs=nnx.Rngs(0)))

    def backward(params: Any, x: jax.Array) -> Any:
        return jax.vjp(lambda params, x: normalize(nnx.merge(norm.graph, params), x), params, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, norm.params, X))
    assert sorted(leaf.shape for leaf in kept) == [(2, 4, 32), (32,)]
