"""Counts of classes of the user's: our own layers, given as such, count what our formulas say."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from trellax.layers import ModelConfig, activation_bytes, flops_per_token, param_counts
from trellax.layers.own.counts import device_sizes, split_features, tell_counts
from trellax.layers.own.products import TracedProduct, list_products
from trellax.meshes import ModelError
from trellax.plan.costs.device_params import block_matrices, block_params

T = 16
OURS = {"mlp_class": "trellax.layers:MLP", "attention_class": "trellax.layers:Attention"}


def config_of(**more: Any) -> ModelConfig:
    sizes = {"vocab_size": 64, "num_layers": 3, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
    return ModelConfig(**sizes, mlp="swiglu", **more)


class Counted(nnx.Module):
    """Runs a product in a loop whose length a trace does not tell, and counts its flops itself."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, rules: Any) -> None:
        del rngs, rules
        self.weight = nnx.Param(jnp.zeros((config.hidden_size,) * 2), out_sharding=("embed", None))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        def is_large(x: jax.Array) -> jax.Array:
            return (x * x).sum() > 1

        return jax.lax.while_loop(is_large, lambda x: x @ self.weight[...], x_BTD)

    @staticmethod
    def flops_per_token(config: ModelConfig, *, num_tokens: int) -> int:
        return 7 * config.hidden_size * num_tokens


class Uncounted(Counted):
    """The same without the count."""

    flops_per_token = None  # type: ignore[assignment]


def test_our_layers_as_classes_of_the_user_count_as_ours() -> None:
    ours, own = config_of(), config_of(**OURS)
    assert param_counts(own) == param_counts(ours)
    # A jaxpr has the products of masked scores too.
    asked: dict[str, Any] = {"num_tokens": T, "attention": "full"}
    assert flops_per_token(own, **asked).training == flops_per_token(ours, **asked).training
    for tensor in (1, 2, 4):
        assert block_params(own, tensor=tensor) == block_params(ours, tensor=tensor)
        assert block_matrices(own, tensor=tensor) == block_matrices(ours, tensor=tensor)


@pytest.mark.parametrize(
    ("remat", "tensor"),
    [
        ("none", 2),
        *(pytest.param(remat, tensor, marks=pytest.mark.slow) for remat in ("dots", "full") for tensor in (1, 2)),
        pytest.param("none", 1, marks=pytest.mark.slow),
    ],
)
def test_our_layers_as_classes_of_the_user_keep_as_many_bytes(tensor: int, remat: Any) -> None:
    sizes: dict[str, Any] = {"num_sequences": 3, "num_tokens": T, "tensor": tensor, "remat": remat}
    assert activation_bytes(config_of(**OURS), **sizes) == activation_bytes(config_of(), **sizes)


def test_products_of_loops_and_branches_are_counted_as_often_as_they_run() -> None:
    w = jnp.zeros((8, 8))

    def run(w: jax.Array, x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, length=5)
        y = jax.lax.cond(y.sum() > 0, lambda y: y @ w @ w, lambda y: y, y)
        return jax.checkpoint(jnp.matmul)(y, y.T)

    found = list_products(jax.make_jaxpr(run)(w, jnp.zeros((4, 8))).jaxpr, [False, True])
    one = TracedProduct(m=4, n=8, k=8, batch=1, is_weight=True)
    assert found.products == (
        replace(one, count=5),
        one,
        one,
        TracedProduct(m=4, n=4, k=8, batch=1, is_weight=False),
    )
    assert (found.depends, found.uncounted) == ((True,), frozenset())


def test_class_may_count_its_flops_itself() -> None:
    own = config_of(mlp_class=f"{__name__}:Counted")
    without = flops_per_token(config_of(**OURS | {"attention_class": ""}), num_tokens=T).weights
    assert flops_per_token(own, num_tokens=T).weights == without + 3 * (7 * 32 * T - 6 * 32 * own.ffn_size)
    assert "Counted counts by its flops_per_token." in tell_counts(own)


def test_loop_whose_length_is_not_known_asks_for_a_count() -> None:
    with pytest.raises(ModelError, match="has the primitive while, whose products cannot be counted"):
        flops_per_token(config_of(mlp_class=f"{__name__}:Uncounted"), num_tokens=T)


def test_what_tensor_splits_follows_from_the_dims() -> None:
    own = config_of(**OURS)
    assert split_features(own) == 32
    assert device_sizes(own, {"tensor": 4})[1] < device_sizes(own, {"tensor": 2})[1] < param_counts(own).block
