"""Kernels of four bits: the codes of qwix, what a layer makes of them, and the models that cannot have them."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import ModelConfig
from trellax.layers.linear import ColumnLinear, RowLinear
from trellax.layers.lora.check_config import Lora
from trellax.layers.lora.nf4 import dequantize_nf4, quantize_nf4, round_nf4, whole_shape
from trellax.meshes import ModelError

KERNEL = np.random.default_rng(0).standard_normal((2, 128, 96)).astype(np.float32)
FROZEN = Lora(rank=2, scale=1.0, base="nf4")
NF4 = {"lora_rank": 2, "lora_base": "nf4"}
REFUSED: dict[str, dict[str, Any]] = {
    "without_adapters": {"lora_base": "nf4"},
    "magnitude": NF4 | {"lora_magnitude": "on"},
    "matmuls": NF4 | {"matmuls": "fp8"},
    "width": NF4 | {"hidden_size": 18, "num_heads": 3},
}


@pytest.mark.skipif(importlib.util.find_spec("qwix") is None, reason="needs trellax[quant]")
@pytest.mark.parametrize(("dim", "block"), [(-2, 64), (-1, 32)])
def test_values_and_scales_are_those_of_qwix(dim: int, block: int) -> None:
    import qwix

    own = quantize_nf4(jnp.asarray(KERNEL), dim=dim)
    other = qwix.quantize(KERNEL, "nf4", channelwise_axes=(0, 1 if dim == -1 else 2), tiled_axes={3 + dim: block})
    assert np.array_equal(own[1], other.scale)
    assert np.array_equal(dequantize_nf4(*own), qwix.dequantize(other))


@pytest.mark.parametrize("dim", [-2, -1])
def test_a_number_is_the_nearest_of_sixteen_times_the_largest_of_its_block(dim: int) -> None:
    values, scale = quantize_nf4(jnp.asarray(KERNEL), dim=dim)
    assert whole_shape(values, scale) == KERNEL.shape
    assert values.nbytes * 2 == KERNEL.size
    found, block = np.asarray(dequantize_nf4(values, scale)), KERNEL.shape[dim] // scale.shape[dim]
    largest = np.repeat(np.asarray(scale), block, axis=dim)
    # The widest gap between two of the sixteen is 0.304.
    assert (np.abs(found - KERNEL) <= 0.1521 * largest).all()
    assert np.array_equal(round_nf4(jnp.asarray(found), dim=dim), found)


def test_zeros_stay_zeros_and_a_number_that_is_none_stays_none() -> None:
    kernel = np.zeros((64, 3), np.float32)
    kernel[5, 1], kernel[5, 2] = np.nan, np.inf
    found = np.asarray(round_nf4(jnp.asarray(kernel), dim=-2))
    assert not found[:, 0].any()
    assert np.isnan(found[:, 1:]).all()


@pytest.mark.parametrize("make", [ColumnLinear, RowLinear])
def test_a_layer_multiplies_by_the_rounded_kernel(make: Any) -> None:
    plain, held = (
        make(64, 128, dim="ffn", rngs=nnx.Rngs(0), bias="off", lora=lora) for lora in (Lora(rank=2, scale=1.0), FROZEN)
    )
    kernel = round_nf4(plain.kernel[...], dim=-2 if make is ColumnLinear else -1)
    x = jnp.asarray(KERNEL[:, :8, :64])
    np.testing.assert_allclose(held(x), x @ kernel, atol=1e-5)
    assert held.kernel[...].dtype == jnp.uint8
    grads = jax.grad(lambda x: held(x).sum())(x)
    np.testing.assert_allclose(grads, jnp.ones((2, 8, 128)) @ kernel.T, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_model_that_cannot_have_them_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    sizes: dict[str, Any] = {"vocab_size": 64, "num_layers": 1, "hidden_size": 32, "num_heads": 2}
    with pytest.raises(ModelError) as error:
        ModelConfig(**sizes | REFUSED[name])
    golden(f"errors/layers/nf4_{name}.txt", str(error.value))
