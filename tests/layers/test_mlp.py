"""Feed-forward layers are their formulas, on one device and split over many."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import MLP

from .sharded import Probe, collectives, differing, mesh_of, normal, small_config

X = normal(2, 4, 32)
OPTIONS: dict[str, dict[str, Any]] = {
    "gelu": {"mlp": "gelu"},
    "swiglu": {"mlp": "swiglu"},
    "swiglu_with_biases": {"mlp": "swiglu", "bias": "on"},
}


def probe(name: str) -> Probe:
    style = "gpt" if name == "gelu" else "llama"
    return Probe.of(lambda: MLP(small_config(style, **OPTIONS[name]), rngs=nnx.Rngs(0)))


def formula(params: dict[str, Any], x: np.ndarray) -> jax.Array:
    def linear(name: str, x: Any) -> Any:
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    up = linear("up", x)
    if "gate" not in params:
        return linear("down", 0.5 * up * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))))
    gate = linear("gate", x)
    return linear("down", gate / (1 + jnp.exp(-gate)) * up)


@pytest.mark.parametrize("name", OPTIONS)
def test_mlp_and_its_gradients_are_those_of_the_formula(name: str) -> None:
    mlp = probe(name)
    with jax.numpy_rank_promotion("allow"):
        y, vjp = jax.vjp(formula, mlp.params, X)
        grads, grad_x = vjp(normal(*y.shape, seed=2))
    assert differing(mlp.answer(X), jax.device_get({"y": y, "grads": grads, "x": grad_x})) == {}


@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=4"])
@pytest.mark.parametrize("name", OPTIONS)
def test_mlp_on_any_mesh_matches_one_device(name: str, mesh: str) -> None:
    mlp = probe(name)
    assert differing(mlp.answer(X, mesh=mesh_of(mesh)), mlp.answer(X)) == {}


@pytest.mark.parametrize("name", OPTIONS)
def test_mlp_costs_one_all_reduce_forward(name: str) -> None:
    found = collectives(probe(name).program(X, mesh=mesh_of("tensor=4")))
    assert [(one.kind, one.shape) for one in found] == [("all-reduce", (2 * 4, 32))]
