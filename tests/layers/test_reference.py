"""Every layer, its gradients and the whole model against formulas in float64 that share no code with them.

Relative to the largest number of a layer 1e-5: float32 has 24 bits, and sums here have up to 100 terms.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from trellax.layers import MLP, Attention, Block, ColumnLinear, Embedding, RowLinear, Transformer
from trellax.layers.norms import make_norm

from . import reference
from .sharded import STYLES, Probe, differing, draw_params, normal, small_config

TOLERANCE = 1e-5
X = normal(2, 12, 32)
TOKENS: Any = np.random.default_rng(5).integers(0, 64, (2, 12)).astype(np.int32)
TARGETS: Any = np.random.default_rng(6).integers(0, 64, (2, 12)).astype(np.int32)
WEIGHTS: Any = np.random.default_rng(7).integers(0, 3, (2, 12)).astype(np.float32) / 24
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "llama": {"num_kv_heads": 2, "embeddings": "untied"},
    "qwen": {"num_kv_heads": 4},
}
LAYERS: dict[str, tuple[Callable[..., nnx.Module], Callable[..., Any], np.ndarray]] = {
    "norm": (make_norm, reference.norm, 3 * X + 1),
    "mlp": (MLP, reference.mlp, X),
    "attention": (Attention, reference.attention, X),
    "block": (Block, reference.block, X),
    "embedding": (Embedding, reference.embedding, TOKENS),
}


def config_of(style: str) -> Any:
    return small_config(style, **VARIANTS[style])


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_and_its_gradients_are_the_formula_in_float64(layer: str, style: str) -> None:
    build, formula, x = LAYERS[layer]
    config = config_of(style)
    probe = Probe.of(lambda: build(config, rngs=nnx.Rngs(0)))
    actual = probe.answer(x)
    expected = reference.vjp_in_float64(
        lambda params, x: formula(config, params, x), probe.params, x, normal(*actual["y"].shape, seed=2)
    )
    assert differing(actual, expected, tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("layer", [ColumnLinear, RowLinear])
def test_linear_and_its_gradients_are_the_formula_in_float64(layer: Any) -> None:
    probe = Probe.of(lambda: layer(32, 24, dim="ffn", rngs=nnx.Rngs(0)))
    expected = reference.vjp_in_float64(reference.linear, probe.params, X, normal(2, 12, 24, seed=2))
    assert differing(probe.answer(X), expected, tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("style", STYLES)
def test_logits_loss_and_all_gradients_are_the_formula_in_float64(style: str) -> None:
    config = config_of(style)
    graph, params = _transformer(config)

    def ours(params: Any) -> dict[str, Any]:
        model = nnx.merge(graph, params)
        value, grads = jax.value_and_grad(lambda p: nnx.merge(graph, p).loss(TOKENS, TARGETS, WEIGHTS))(params)
        return {"logits": model(TOKENS), "loss": value, "grads": grads}

    def formula(params: Any) -> dict[str, Any]:
        def loss(params: Any) -> jax.Array:
            return reference.loss(reference.transformer(config, params, TOKENS), TARGETS, WEIGHTS)

        value, grads = jax.value_and_grad(loss)(params)
        return {"logits": reference.transformer(config, params, TOKENS), "loss": value, "grads": grads}

    actual, expected = jax.device_get(jax.jit(ours)(params)), reference.in_float64(formula, params)
    for part in ("logits", "loss", "grads"):
        assert differing({"_": actual[part]}, {"_": expected[part]}, tolerance=TOLERANCE) == {}, part


@pytest.mark.parametrize("ratio", [10, 100, 1000, 3000])
def test_layernorm_keeps_its_digits_where_the_mean_is_large(ratio: int) -> None:
    # The deviations from the mean are exact to an ulp of the mean: 2^-24 of `ratio`, and a few of those.
    config = config_of("gpt")
    probe = Probe.of(lambda: make_norm(config, rngs=nnx.Rngs(0)))
    x = (X + ratio).astype(np.float32)
    expected = reference.in_float64(lambda params, x: reference.norm(config, params, x), probe.params, x)
    assert differing({"y": probe.answer(x)["y"]}, {"y": expected}, tolerance=4 * ratio * 2.0**-24 + 1e-6) == {}


@pytest.mark.parametrize("style", STYLES)
def test_large_scores_and_logits_keep_their_digits(style: str) -> None:
    # Scores of some hundred: a softmax that did not subtract its maximum would overflow in float32.
    config = config_of(style)
    probe = Probe.of(lambda: Attention(config, rngs=nnx.Rngs(0)))
    x = 30 * X
    expected = reference.in_float64(lambda params, x: reference.attention(config, params, x), probe.params, x)
    # exp() turns an error of 2^-24 of a score into that times the score.
    assert differing({"y": probe.answer(x)["y"]}, {"y": expected}, tolerance=1e-3) == {}


def _transformer(config: Any) -> tuple[Any, Any]:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return nnx.split(model)[0], draw_params(model)
