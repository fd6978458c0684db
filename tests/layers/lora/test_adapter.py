"""A layer with an adapter is y = x W + (alpha / r) (x A) B, on one device and split by the compiler."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ColumnLinear, ModelConfig, RowLinear, Transformer, flops_per_token, param_counts
from trellax.layers.lora.adapter import whole_kernel
from trellax.layers.lora.check_config import Lora
from trellax.layers.partitioning import place_model
from trellax.meshes import MeshSpec, ModelError, build_mesh

SIZES: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 24, "shared_size": 16}
LATENTS: dict[str, Any] = {"num_kv_heads": 4, "latent_size": 12, "query_latent_size": 8, "rope_head_size": 4}
LLAMA: dict[str, Any] = SIZES | {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off"}


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_adapter_adds_a_scaled_product_of_low_rank(kind: Any) -> None:
    layer = kind(16, 24, dim="ffn", rngs=nnx.Rngs(0), std=0.3, lora=Lora(rank=3, scale=2.0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    plain = x @ layer.kernel[...]
    np.testing.assert_allclose(layer(x), plain, atol=1e-6)
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 24))
    np.testing.assert_allclose(layer(x), plain + 2.0 * x @ layer.lora_a[...] @ layer.lora_b[...], atol=1e-5)


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
def test_magnitudes_are_the_lengths_of_the_columns(kind: Any) -> None:
    layer = kind(16, 24, dim="ffn", rngs=nnx.Rngs(0), std=0.3, lora=Lora(rank=3, scale=2.0, magnitude="on"))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    np.testing.assert_allclose(layer(x), x @ layer.kernel[...], atol=1e-5)
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 24))
    layer.lora_m[...] = jnp.linspace(0.5, 2.0, 24)
    kernel, low, high, m = (np.asarray(w[...]) for w in (layer.kernel, layer.lora_a, layer.lora_b, layer.lora_m))
    whole, given = kernel + 2.0 * low @ high, np.asarray(x)
    lengths = np.linalg.norm(whole, axis=0)
    wanted = given @ (whole * m / lengths)
    np.testing.assert_allclose(layer(x), wanted, atol=1e-5)
    # The length is a constant to the gradient (Liu et al. 2024, section 4.3).
    grads = nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer)
    by_m = 2 * wanted * (given @ whole) / lengths
    np.testing.assert_allclose(grads["lora_m"][...], by_m.sum((0, 1)), rtol=1e-4)
    by_b = np.einsum("btr,btf->rf", given @ low, 2 * wanted * m / lengths) * 2.0
    np.testing.assert_allclose(grads["lora_b"][...], by_b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [ColumnLinear, RowLinear])
@pytest.mark.parametrize(
    "how", [{}, {"magnitude": "on"}, pytest.param({"base": "nf4"}, marks=pytest.mark.slow)], ids=str
)
def test_whole_kernel_is_what_a_layer_multiplies_by(kind: Any, how: dict[str, Any]) -> None:
    layer = kind(16, 24, dim="ffn", rngs=nnx.Rngs(0), std=0.3, bias="off", lora=Lora(rank=3, scale=2.0, **how))
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 24))
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    np.testing.assert_allclose(x @ whole_kernel(layer), layer(x), atol=1e-4)


def test_kernel_of_a_layer_with_an_adapter_has_no_gradient() -> None:
    layer = ColumnLinear(16, 24, dim="ffn", rngs=nnx.Rngs(0), lora=Lora(rank=3, scale=2.0))
    grads = nnx.grad(lambda layer: layer(jnp.ones((1, 2, 16))).sum())(layer)
    assert not grads["kernel"][...].any()
    assert grads["lora_b"][...].any()


@pytest.mark.parametrize("targets", [(), ("query", "down")])
def test_model_with_adapters_is_the_same_split_by_the_compiler(targets: tuple[str, ...]) -> None:
    config = ModelConfig(**LLAMA, lora_rank=4, lora_targets=targets)
    model = Transformer(config, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    nnx.update(
        model, jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), state)
    )
    tokens = jnp.arange(24).reshape(2, 12) % 64
    wanted = np.asarray(model(tokens))
    mesh = build_mesh(MeshSpec(data=2, tensor=2), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        found = nnx.jit(lambda model, tokens: model(tokens))(place_model(model, mesh=mesh), tokens)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("more", "targets", "magnitude"),
    [
        ({}, (), "off"),
        ({}, ("key", "gate"), "off"),
        ({}, (), "on"),
        (EXPERTS | {"dense_layers": 1}, (), "on"),
        (EXPERTS | {"dense_layers": 1}, ("mlp.experts.*",), "off"),
        (EXPERTS | LATENTS, ("*.attention.*", "shared.down"), "on"),
        ({"embeddings": "untied"}, ("up", "head"), "on"),
    ],
)
def test_counts_are_those_of_the_parameters(more: dict[str, Any], targets: tuple[str, ...], magnitude: Any) -> None:
    config = ModelConfig(**LLAMA | more, lora_rank=4, lora_targets=targets, lora_magnitude=magnitude)
    leaves = jax.tree_util.tree_leaves_with_path(
        nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param))
    )
    counts = param_counts(config)
    assert sum(leaf.size for _, leaf in leaves) == counts.total
    assert sum(leaf.size for path, leaf in leaves if path[-1].key.startswith("lora")) == counts.trained


def test_frozen_weights_have_one_product_in_the_backward() -> None:
    own, plain = (flops_per_token(ModelConfig(**LLAMA, lora_rank=r), num_tokens=16) for r in (1, 0))
    adapters = own.weights - plain.weights
    assert own.training == 2 * plain.weights + 3 * plain.scores + 3 * adapters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_rank": -1}, "lora_rank=-1 is negative"),
        ({"lora_alpha": 4.0}, "lora_rank=0: the model has no adapters"),
        ({"lora_magnitude": "on"}, "lora_magnitude='on', but lora_rank=0"),
        ({"lora_rank": 2, "lora_targets": ("qurey",)}, "Did you mean 'query'"),
        ({"lora_rank": 2, "lora_targets": ["query"]}, "is not a tuple of names"),
        ({"lora_rank": 2, "lora_targets": ("gate",), "mlp": "gelu"}, "mlp='gelu' has none"),
        ({"lora_rank": 2, "lora_targets": ("head",)}, "the table of the head is the embedding's"),
    ],
)
def test_fields_that_do_not_agree_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModelConfig(**(LLAMA | fields))
