"""Of a layer, what depends on its input is kept for the backward pass, and nothing else."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.layers import Remat
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import split_transformer
from trellax.pipeline.residuals import LayerVjp

from .law import NUM_TOKENS, natural_params, small_model

Layer = Callable[[Any, jax.Array, Any], jax.Array]


def matmul(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return x @ params["w"]


def cast_matmul(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32)


def masked(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    """Attention in small: scores under a causal mask and the microbatch's own mask."""
    causal = jnp.tril(jnp.ones((x.shape[0], x.shape[0]), bool))
    scores = jnp.where(causal & microbatch["mask"], x @ params["w"] @ x.T, -1e9)
    return jax.nn.softmax(scores, axis=-1) @ x


def constant(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return params["w"][: x.shape[0]] * 2.0


TOYS: dict[str, Layer] = {"matmul": matmul, "cast": cast_matmul, "masked": masked, "constant": constant}
X = np.linspace(-1, 1, 6 * 8, dtype=np.float32).reshape(6, 8)
PARAMS = {"w": np.linspace(-0.5, 0.5, 64, dtype=np.float32).reshape(8, 8)}
MICROBATCH = {"mask": np.arange(36).reshape(6, 6) % 5 != 3}


def kept_shapes(layer: Layer) -> list[tuple[int, ...]]:
    return [leaf.shape for leaf in LayerVjp(layer).plan(PARAMS, jnp.asarray(X), MICROBATCH)]


def block(remat: Remat) -> tuple[Layer, Any]:
    """One block of a small transformer, with its parameters."""
    config = small_model(style="gpt")
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1])
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), natural_params(config)["blocks"])
    return split_transformer(config, mesh=mesh, remat=remat).fns.layer, params


def both_ways(layer: Layer, params: Any, x: jax.Array, microbatch: Any) -> tuple[Any, Any]:
    """Return (y, gradients) through the residuals as data, and as `jax.vjp` has them."""
    vjp = LayerVjp(layer)
    vjp.plan(params, x, microbatch)

    def split(params: Any, x: jax.Array) -> Any:
        y, residuals = vjp.forward(params, x, microbatch)
        return y, vjp.backward(params, residuals, microbatch, jnp.cos(y))

    def whole(params: Any, x: jax.Array) -> Any:
        y, pull = jax.vjp(lambda params, x: layer(params, x, microbatch), params, x)
        return y, pull(jnp.cos(y))

    return jax.jit(lambda params, x: (split(params, x), whole(params, x)))(params, x)


def test_matmul_keeps_its_input_but_not_its_weight() -> None:
    assert kept_shapes(matmul) == [(6, 8)]


def test_cast_of_a_weight_is_not_kept() -> None:
    assert kept_shapes(cast_matmul) == [(6, 8)]


def test_masks_are_not_kept() -> None:
    kept = LayerVjp(masked).plan(PARAMS, jnp.asarray(X), MICROBATCH)
    assert [leaf.dtype for leaf in kept if leaf.dtype == jnp.bool_] == []


def test_layer_that_ignores_its_input_keeps_nothing() -> None:
    assert kept_shapes(constant) == []


@pytest.mark.parametrize("name", TOYS)
def test_backward_from_residuals_equals_vjp(name: str) -> None:
    actual, expected = both_ways(TOYS[name], PARAMS, jnp.asarray(X), MICROBATCH)
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_backward_of_a_block_equals_vjp(remat: Remat) -> None:
    layer, params = block(remat)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, NUM_TOKENS, 64), np.float32))
    actual, expected = both_ways(layer, params, x, None)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)
    assert jax.tree.all(same)


def test_block_keeps_no_weight_and_no_causal_mask() -> None:
    layer, params = block("none")
    x = jnp.zeros((2, NUM_TOKENS, 64))
    kept = LayerVjp(layer).plan(params, x, None)
    weights = {leaf.shape for leaf in jax.tree.leaves(params)}
    assert [leaf for leaf in kept if leaf.shape in weights] == []
    assert [leaf for leaf in kept if leaf.dtype == jnp.bool_] == []


def test_block_with_full_remat_keeps_its_input_alone() -> None:
    layer, params = block("full")
    x = jnp.zeros((2, NUM_TOKENS, 64))
    assert [leaf.shape for leaf in LayerVjp(layer).plan(params, x, None)] == [x.shape]


def test_block_with_dots_keeps_less_than_without_remat() -> None:
    x = jnp.zeros((2, NUM_TOKENS, 64))

    def num_kept(remat: Remat) -> int:
        layer, params = block(remat)
        return sum(leaf.size for leaf in LayerVjp(layer).plan(params, x, None))

    assert num_kept("full") < num_kept("dots") < num_kept("none")


def test_one_array_in_two_shapes_is_kept_once() -> None:
    def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        y = x @ params["w"]
        flat = y.reshape(-1)
        return y * y[::-1] + (flat * flat[::-1]).reshape(x.shape)

    kept = [leaf.shape for leaf in LayerVjp(layer).plan(PARAMS, jnp.asarray(X), MICROBATCH)]
    plain = [leaf.shape for leaf in jax.tree.leaves(jax.vjp(lambda x: layer(PARAMS, x, None), jnp.asarray(X))[1])]
    # y and flat are one array; both reversed are others.
    assert len(plain) - len(kept) >= 1
    assert (plain.count((48,)), kept.count((48,))) == (2, 1)
    actual, expected = both_ways(layer, PARAMS, jnp.asarray(X), MICROBATCH)
    assert jax.tree.all(jax.tree.map(np.array_equal, actual, expected))
