"""What a config says of parameters, flops and activations is what the layers have, compute and keep."""

import math
from dataclasses import replace
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.layers import (
    Block,
    ModelConfig,
    Remat,
    Transformer,
    activation_bytes,
    flops_per_token,
    model_rules,
    param_counts,
)
from trellax.layers.block import rematerialize
from trellax.meshes import ModelError

from ..pipeline.plain_vjp import plan_plain
from .sharded import STYLES, mesh_of, small_config

B, T = 3, 16
REMATS: tuple[Remat, ...] = get_args(Remat)
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gpt2_small": (124_439_808, {"vocab_size": 50257, "num_layers": 12, "hidden_size": 768, "num_heads": 12}),
    "gpt2_xl": (1_557_611_200, {"vocab_size": 50257, "num_layers": 48, "hidden_size": 1600, "num_heads": 25}),
    "llama3_8b": (
        8_030_261_248,
        {"vocab_size": 128256, "num_layers": 32, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8}
        | {"ffn_size": 14336, "embeddings": "untied"},
    ),
}
CONFIGS = st.builds(
    lambda style, kv, **sizes: small_config(style, num_heads=4, num_kv_heads=kv, **sizes),
    st.sampled_from(list(STYLES)),
    st.sampled_from([1, 2, 4]),
    num_layers=st.integers(1, 3),
    head_size=st.sampled_from([0, 16]),
    mlp=st.sampled_from(["gelu", "swiglu", "geglu", "clamped_swiglu"]),
    attention_sinks=st.sampled_from(["off", "on"]),
    norm=st.sampled_from(["layernorm", "rmsnorm", "rmsnorm1p"]),
    bias=st.sampled_from(["on", "qkv", "off"]),
    qk_norm=st.sampled_from(["on", "whole", "off"]),
    norm_place=st.sampled_from(["before", "after", "both"]),
    embeddings=st.sampled_from(["tied", "untied"]),
)


def split(module: nnx.Module) -> tuple[Any, dict[str, Any]]:
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def dot_flops(jaxpr: Any) -> int:
    """Flops of every matmul in a jaxpr, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        inside = [sub for value in equation.params.values() for sub in jax.tree.leaves(value, is_leaf=is_jaxpr)]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(dot_flops(getattr(sub, "jaxpr", sub)) for sub in inside if is_jaxpr(sub))
    return total


def is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def traced_flops(config: ModelConfig, *, what: str, remat: Remat = "none") -> int:
    graph, params = split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), remat=remat)))

    def loss(params: Any, *batch: jax.Array) -> jax.Array:
        return nnx.merge(graph, params).loss(*batch)

    tokens, weights = jax.ShapeDtypeStruct((B, T), "int32"), jax.ShapeDtypeStruct((B, T), "float32")
    run = jax.grad(loss) if what == "training" else loss
    return dot_flops(jax.make_jaxpr(run)(params, tokens, tokens, weights).jaxpr)


def layer_of(config: ModelConfig, remat: Remat, *, tensor: int = 1) -> tuple[Any, Any]:
    rules = model_rules(config, {"tensor": tensor})
    graph, params = split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0), rules=rules)))
    return rematerialize(lambda params, x, _: nnx.merge(graph, params)(x), remat), params


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name: str) -> None:
    expected, sizes = PUBLISHED[name]
    config = ModelConfig(max_tokens=1024, **(STYLES["gpt" if name.startswith("gpt") else "llama"] | sizes))
    assert param_counts(config).total == expected


@settings(derandomize=True, deadline=None, max_examples=20)
@given(config=CONFIGS)
def test_parameters_are_as_many_as_the_model_has_in_every_part(config: ModelConfig) -> None:
    params = split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[1]
    counts = param_counts(config)
    assert counts.total == count(params)
    assert counts.embedding + counts.positions == count(params["embed"])
    assert counts.block * config.num_layers == count(params["blocks"])
    assert counts.head == count(params["head"])


@settings(derandomize=True, deadline=None, max_examples=5)
@given(config=CONFIGS)
def test_flops_are_those_of_the_traced_matmuls(config: ModelConfig) -> None:
    flops = flops_per_token(config, num_tokens=T, attention="full")
    assert traced_flops(config, what="forward") == B * T * flops.forward
    # Attention's backward makes its scores again, one of the two products.
    assert traced_flops(config, what="training") == B * T * (flops.training + flops.scores / 2)


def test_recomputation_does_not_count_as_model_flops() -> None:
    config = small_config()
    flops = flops_per_token(config, num_tokens=T, attention="full")
    blocks = flops.forward + flops.scores / 2 - 2 * config.vocab_size * config.hidden_size
    # The traced program runs the forward of the blocks once more, and scores yet again, but for the last matmul, whose
    # output no gradient needs.
    again = blocks - 2 * config.num_layers * config.ffn_size * config.hidden_size
    assert traced_flops(config, what="training", remat="full") == B * T * (flops.training + again)


def test_causal_scores_are_half_of_all_and_weights_are_the_same() -> None:
    causal, full = (flops_per_token(small_config(), num_tokens=T, attention=how) for how in ("causal", "full"))
    assert (2 * causal.scores, causal.weights) == (full.scores, full.weights)


@pytest.mark.parametrize(("window", "pairs"), [(0, 128), (16, 128), (5, 67.5), (1, 15.5)])
def test_window_counts_the_scores_it_lets_through(window: int, pairs: float) -> None:
    full, seen = (
        flops_per_token(small_config(attention_window=window), num_tokens=T, attention=how)
        for how in ("full", "causal")
    )
    assert seen.scores == int(full.scores * pairs / T**2)


def test_training_is_near_six_flops_a_parameter() -> None:
    expected, sizes = PUBLISHED["llama3_8b"]
    config = ModelConfig(**(STYLES["llama"] | sizes))
    matmul_params = expected - param_counts(config).embedding
    assert flops_per_token(config, num_tokens=1).training / (6 * matmul_params) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("remat", REMATS)
@settings(derandomize=True, deadline=None, max_examples=12)
@given(config=CONFIGS, dtype=st.sampled_from(["float32", "bfloat16"]))
def test_layer_keeps_as_many_bytes_as_its_residuals_have(remat: Remat, config: ModelConfig, dtype: str) -> None:
    config = ModelConfig(**(vars(config) | {"dtype": dtype}))
    layer, params = layer_of(config, remat)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), dtype)
    kept = plan_plain(layer, params, x, None).kept
    expected = activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat)
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept) == expected.layer
    assert B * T * config.hidden_size * jnp.dtype(dtype).itemsize == expected.boundary


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("shared", [0, 24])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_layer_of_experts_keeps_as_many_bytes(remat: Remat, shared: int, mlp: Any) -> None:
    config = replace(small_config("llama"), mlp=mlp, num_experts=8, experts_per_token=2, shared_size=shared)
    layer, params = layer_of(config, remat)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), "float32")
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan_plain(layer, params, x, None).kept)
    expected = activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat).layer
    assert kept == (pytest.approx(expected, rel=0.01) if remat == "none" else expected)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("magnitude", ["off", "on"])
def test_layer_with_adapters_keeps_as_many_bytes(remat: Remat, magnitude: Any) -> None:
    config = replace(small_config("llama"), lora_rank=4, lora_magnitude=magnitude)
    layer, params = layer_of(config, remat)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), "float32")
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan_plain(layer, params, x, None).kept)
    assert kept == activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat).layer


def test_experts_are_counted_whole_as_parameters_and_in_part_as_flops() -> None:
    config = replace(small_config("llama"), num_experts=8, experts_per_token=2, expert_size=40, shared_size=24)
    params = split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[1]
    assert param_counts(config).total == count(params)
    one, all_of_them = (
        flops_per_token(replace(config, experts_per_token=k), num_tokens=T).weights for k in (1, config.num_experts)
    )
    assert all_of_them - one == 2 * config.num_layers * 7 * 3 * config.hidden_size * config.expert_size


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize(("style", "num_kv_heads"), [("gpt", 8), ("llama", 4), ("llama", 2), ("qwen", 4)])
def test_device_keeps_as_many_bytes_as_its_part_of_the_residuals(style: str, num_kv_heads: int, remat: Remat) -> None:
    config, mesh = small_config(style, num_kv_heads=num_kv_heads), mesh_of("tensor=4")
    layer, params = layer_of(config, remat, tensor=4)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), "float32")
    with jax.set_mesh(mesh):
        vjp = plan_plain(layer, params, x, None)
        # With y, though it is not looked at: what made it would be dropped, and with it what splits the residuals.
        forward = jax.jit(lambda params, x: vjp.forward(params, x, None))
        shardings = forward.lower(params, x).compile().output_shardings[1]
        shapes = jax.eval_shape(forward, params, x)[1]
    parts = [split.shard_shape(leaf.shape) for split, leaf in zip(shardings, shapes, strict=True)]
    expected = activation_bytes(config, num_sequences=B, num_tokens=T, tensor=4, remat=remat)
    assert 4 * sum(map(math.prod, parts)) == expected.layer


def test_model_that_does_not_split_has_no_activation_bytes() -> None:
    with pytest.raises(ModelError, match="num_heads=8 does not split over tensor=3"):
        activation_bytes(small_config(), num_sequences=1, num_tokens=T, tensor=3)
