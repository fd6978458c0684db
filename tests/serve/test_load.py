"""Weights in eight bits: what a server computes with them is what their rounded values give, on every mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.layers import RowLinear
from trellax.layers.quantized import Weights, dequantize, quantize, quantize_layers
from trellax.meshes import ServeError
from trellax.serve import Engine, Request, param_shapes
from trellax.serve.experts import with_room
from trellax.serve.load import quantize_params
from trellax.serve.measure import read_bytes
from trellax.serve.params import weights_of

from .models import logits_of, mesh_of, model_of, numbers_of, params_on
from .test_law import CUTS, MESHES, TOLERANCE, cached_logits

KINDS = ["gpt", "llama", "uneven", "experts", "dense_and_experts", "latents"]


def engine_of(style: str, weights: Weights, *, params: Any = None) -> Engine:
    """An engine on one device, with weights as they are or quantized."""
    config, mesh = model_of(style), mesh_of("data=1")
    given = params_on(config, mesh) if params is None else params
    params, _ = quantize_params(given, config=config, mesh=mesh, weights=weights)
    return Engine(config, params, mesh=mesh, slots=4, chunk=4, page=2)


def rounded(style: str, weights: Weights) -> Any:
    """The parameters of one device, each rounded and widened again."""
    mesh, config = mesh_of("data=1"), model_of(style)
    params, _ = quantize_params(params_on(config, mesh), config=config, mesh=mesh, weights=weights)

    def widen(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        scale = node.get("kernel_scale")
        return {
            name: dequantize(own, scale) if name == "kernel" else widen(own)
            for name, own in node.items()
            if name != "kernel_scale"
        }

    return widen(params)


def check(mesh: str, style: str, weights: Weights) -> None:
    tokens_BT = np.random.default_rng(0).integers(0, 64, (4, CUTS[-1])).astype(np.int32)
    config = with_room(model_of(style), num_tokens=1)
    actual = cached_logits(config, mesh=mesh_of(mesh), tokens_BT=tokens_BT, weights=weights)
    expected = logits_of(model_of(style), tokens_BT, params=rounded(style, weights))
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_a_layer_multiplies_by_its_rounded_kernel(weights: Weights) -> None:
    layer: Any = quantize_layers(nnx.Sequential(RowLinear(16, 8, dim="ffn", rngs=nnx.Rngs(0))), weights).layers[0]
    x = np.random.default_rng(0).standard_normal((2, 3, 16)).astype(np.float32)
    kernel = np.asarray(dequantize(layer.kernel[...], layer.kernel_scale[...]))
    assert layer.kernel[...].dtype.itemsize == 1
    assert np.allclose(layer(x), x @ kernel, atol=1e-6)


@pytest.mark.slow
def test_quantized_on_a_mesh_equals_the_rounded_model_on_one_device() -> None:
    check("tensor=2,pipe=2", "llama", "int8")


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("style", KINDS)
@pytest.mark.parametrize("mesh", MESHES)
def test_quantized_on_all_meshes_equals_the_rounded_model(mesh: str, style: str, weights: Weights) -> None:
    check(mesh, style, weights)


@pytest.mark.parametrize(("weights", "most"), [("int8", 1 / 254), ("fp8", 2**-4)])
def test_rounding_is_bounded_by_the_largest_weight_of_a_column_or_by_the_weight(weights: Weights, most: float) -> None:
    kernel = np.random.default_rng(0).standard_normal((3, 64, 16)).astype(np.float32) * np.logspace(-6, 6, 16)
    kernel[0, :, 3] = 0
    values, scale = quantize(jnp.asarray(kernel, jnp.float32), weights)
    error = np.abs(np.asarray(dequantize(values, scale)) - kernel)
    top = np.abs(kernel).max(-2, keepdims=True)
    # Below 2**-6 of its unit, 1/448 of the largest, e4m3 has steps of one size.
    bound = top * most if weights == "int8" else np.maximum(np.abs(kernel) * most, top * 2**-10 / 448)
    assert (error <= bound * 1.001).all()


@pytest.mark.slow
def test_the_error_that_is_told_is_that_of_the_kernels() -> None:
    config, mesh = model_of("llama"), mesh_of("data=1")
    _, error = quantize_params(params_on(config, mesh), config=config, mesh=mesh, weights="int8")
    assert error is not None
    shares, lost, whole = {}, 0.0, 0.0
    plain, near = (jax.tree_util.tree_leaves_with_path(tree) for tree in (numbers_of(config), rounded("llama", "int8")))
    for (path, one), (_, other) in zip(plain, near, strict=True):
        if "kernel" in str(path):
            own = ((one - np.asarray(other)) ** 2).sum(), (one**2).sum()
            lost, whole = lost + own[0], whole + own[1]
            shares[jax.tree_util.keystr(path[:-1], simple=True, separator=".")] = (own[0] / own[1]) ** 0.5
    assert error.all == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert error.largest == pytest.approx(shares[error.worst], rel=1e-4)
    assert error.largest == pytest.approx(max(shares.values()), rel=1e-4)


@pytest.mark.slow
def test_an_engine_reads_a_quarter_of_the_bytes_of_float32_kernels() -> None:
    plain, narrow = (engine_of("llama", weights) for weights in ("plain", "int8"))
    shapes = jax.tree_util.tree_leaves_with_path(param_shapes(plain.config, mesh=plain.mesh))
    kernels = sum(leaf.size for path, leaf in shapes if "kernel" in str(path))
    scales = plain.param_bytes_per_device - 3 * kernels
    assert narrow.param_bytes_per_device - scales == pytest.approx(0.06 * 4 * kernels, rel=1)
    assert read_bytes(narrow, batch=1, context=1) < read_bytes(plain, batch=1, context=1) - 2.5 * kernels


@pytest.mark.slow
def test_a_weight_that_is_not_finite_ends_an_answer_with_an_error() -> None:
    config, mesh = model_of("llama"), mesh_of("data=1")
    params = params_on(config, mesh)
    up = params["blocks"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ServeError, match="logits are NaN"):
        engine_of("llama", "int8", params=params).generate([Request(prompt=(1,), max_new_tokens=2)])


@pytest.mark.slow
def test_formats_are_read_off_the_parameters() -> None:
    for style, weights in (("llama", "plain"), ("gpt", "fp8"), ("deepseek", "int8")):
        assert weights_of(param_shapes(model_of(style), mesh=mesh_of("tensor=2"), weights=weights)) == weights
