"""Logits, loss and all gradients of a model with each choice are the formula in float64, and are the same on a mesh."""

from typing import Any

import jax
import pytest
from flax import nnx
from trellax.layers import Transformer

from .. import reference
from ..sharded import differing, draw_params, small_config
from ..test_reference import TARGETS, TOKENS, TOLERANCE, WEIGHTS
from ..test_transformer import Program
from .variants import VARIANTS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_loss_and_all_gradients_are_the_formula_in_float64(name: str) -> None:
    config = small_config("llama", num_kv_heads=4, **VARIANTS[name])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)[0], draw_params(model)

    def ours(params: Any) -> dict[str, Any]:
        loss, grads = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(TOKENS, TARGETS, WEIGHTS))(params)
        return {"logits": nnx.merge(graph, params)(TOKENS), "loss": loss, "grads": grads}

    def formula(params: Any) -> dict[str, Any]:
        def loss(params: Any) -> jax.Array:
            return reference.loss(reference.transformer(config, params, TOKENS), TARGETS, WEIGHTS)

        value, grads = jax.value_and_grad(loss)(params)
        return {"logits": reference.transformer(config, params, TOKENS), "loss": value, "grads": grads}

    actual, expected = jax.device_get(jax.jit(ours)(params)), reference.in_float64(formula, params)
    for part in ("logits", "loss", "grads"):
        assert differing({"_": actual[part]}, {"_": expected[part]}, tolerance=TOLERANCE) == {}, part


@pytest.mark.parametrize("sequence", ["off", "on"])
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_under_jit_on_a_mesh_match_one_device(name: str, sequence: Any) -> None:
    config = small_config("llama", num_kv_heads=2, embeddings="untied", **VARIANTS[name])
    actual, expected = (Program(config, mesh, sequence=sequence).answer() for mesh in ("data=2,tensor=4", "tensor=1"))
    assert abs(actual["loss"] - expected["loss"]) <= 2e-5 * abs(expected["loss"])
    assert differing(actual["grads"], expected["grads"]) == {}
