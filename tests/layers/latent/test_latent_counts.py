"""What a config with latent vectors says of parameters, flops and activations is what the layers have and keep."""

import math
from typing import Any

import jax
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Remat, Transformer, activation_bytes, flops_per_token, param_counts

from ...pipeline.plain_vjp import plan_plain
from ..sharded import mesh_of, small_config
from ..test_counts import REMATS, B, T, count, layer_of, split, traced_flops


def latents(*, queries: int, **more: Any) -> ModelConfig:
    sizes: dict[str, Any] = {"head_size": 12, "rope_head_size": 4, "value_head_size": 6, "latent_size": 24}
    return small_config("llama", **sizes, query_latent_size=queries, **more)


@pytest.mark.parametrize("queries", [0, 16])
def test_parameters_and_flops_are_those_of_the_model(queries: int) -> None:
    config = latents(queries=queries)
    params = split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[1]
    assert param_counts(config).total == count(params)
    flops = flops_per_token(config, num_tokens=T, attention="full")
    assert traced_flops(config, what="forward") == B * T * flops.forward
    # Attention's backward makes its scores again, the product that is as wide as a key.
    again = 2 * T * config.query_size * config.num_layers
    assert traced_flops(config, what="training") == B * T * (flops.training + again)


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("queries", [0, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_keeps_as_many_bytes_as_its_residuals_have(remat: Remat, queries: int, dtype: str) -> None:
    config = latents(queries=queries, dtype=dtype)
    layer, params = layer_of(config, remat)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), dtype)
    kept = plan_plain(layer, params, x, None).kept
    expected = activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat)
    assert sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in kept) == expected.layer


@pytest.mark.parametrize("remat", REMATS)
def test_device_keeps_its_part(remat: Remat) -> None:
    config = latents(queries=16)
    layer, params = layer_of(config, remat, tensor=4)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), "float32")
    with jax.set_mesh(mesh_of("tensor=4")):
        vjp = plan_plain(layer, params, x, None)
        forward = jax.jit(lambda params, x: vjp.forward(params, x, None))
        shardings = forward.lower(params, x).compile().output_shardings[1]
        shapes = jax.eval_shape(forward, params, x)[1]
    parts = [split.shard_shape(leaf.shape) for split, leaf in zip(shardings, shapes, strict=True)]
    expected = activation_bytes(config, num_sequences=B, num_tokens=T, tensor=4, remat=remat)
    assert 4 * sum(map(math.prod, parts)) == expected.layer


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("magnitude", ["off", "on"])
@pytest.mark.parametrize("queries", [0, 16])
def test_layer_with_adapters_keeps_as_many_bytes(remat: Remat, magnitude: str, queries: int) -> None:
    config = latents(queries=queries, lora_rank=4, lora_magnitude=magnitude)
    layer, params = layer_of(config, remat)
    x: Any = jax.ShapeDtypeStruct((B, T, config.hidden_size), "float32")
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in plan_plain(layer, params, x, None).kept)
    assert kept == activation_bytes(config, num_sequences=B, num_tokens=T, remat=remat).layer
