"""Layers refuse arrays of a wrong shape or type, and linear ones take any leading dimensions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trellax.layers import MLP, Attention, ColumnLinear, RowLinear, Transformer, cross_entropy
from trellax.layers import projected_cross_entropy as projected
from trellax.layers.embedding import lookup
from trellax.meshes import ModelError, ShardingError

from .sharded import differing, mesh_of, normal, small_config

MESHES = ["tensor=1", "tensor=4", "data=2,tensor=2"]
ZEROS: Any = np.zeros((2, 4), np.int32)
ONES: Any = np.ones((2, 4), np.float32)


def model(style: str) -> Any:
    return nnx.eval_shape(lambda: Transformer(small_config(style), rngs=nnx.Rngs(0)))


MISTAKES: dict[str, Callable[[], Any]] = {
    "too_many_tokens": lambda: model("gpt")(np.zeros((2, 17), np.int32)),
    "no_tokens": lambda: model("llama")(np.zeros((2, 0), np.int32)),
    "no_sequences": lambda: model("gpt").loss(*[np.zeros((0, 4), np.int32)] * 3),
    "flat_tokens": lambda: model("llama")(np.zeros(16, np.int32)),
    "float_tokens": lambda: model("gpt")(ONES),
    "listed_tokens": lambda: model("gpt")([[1, 2]]),
    "features": lambda: ColumnLinear(16, 8, dim="ffn", rngs=nnx.Rngs(0))(jnp.ones((2, 3, 15))),
    "row_features": lambda: RowLinear(16, 8, dim="ffn", rngs=nnx.Rngs(0))(jnp.ones(())),
    "attention_flat": lambda: Attention(small_config(), rngs=nnx.Rngs(0))(jnp.ones((4, 32))),
    "targets": lambda: cross_entropy(jnp.ones((2, 4, 8)), ZEROS[:, :3], ONES),
    "float_targets": lambda: cross_entropy(jnp.ones((2, 4, 8)), ONES, ONES),
    "head_features": lambda: projected(jnp.ones((2, 4, 8)), jnp.ones((5, 7)), ZEROS, ONES),
}
SPLITS: dict[str, Callable[[], Any]] = {
    "column_ffn": lambda: ColumnLinear(16, 254, dim="ffn", rngs=nnx.Rngs(0))(jnp.ones((2, 3, 16))),
    "row_ffn": lambda: RowLinear(254, 16, dim="ffn", rngs=nnx.Rngs(0))(jnp.ones((2, 3, 254))),
    "column_batch": lambda: ColumnLinear(16, 8, dim="ffn", rngs=nnx.Rngs(0))(jnp.ones((3, 16))),
    "table": lambda: lookup(jnp.ones((65, 4)), ZEROS),
    "lookup_batch": lambda: lookup(jnp.ones((64, 4)), jnp.zeros((3, 4), jnp.int32)),
    "head_table": lambda: projected(jnp.ones((2, 4, 8)), jnp.ones((65, 8)), ZEROS, ONES),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_array_that_a_layer_cannot_read_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ModelError) as caught:
        jax.eval_shape(MISTAKES[name])
    golden(f"errors/layers/layer_{name}.txt", str(caught.value))


@pytest.mark.parametrize("name", SPLITS)
def test_dimension_that_does_not_split_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ShardingError) as caught, jax.set_mesh(mesh_of("data=2,tensor=4")):
        jax.eval_shape(SPLITS[name])
    golden(f"errors/layers/layer_split_{name}.txt", str(caught.value))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("lead", [(), (4,), (4, 2, 3)])
def test_linear_layers_take_any_leading_dimensions(lead: tuple[int, ...], mesh: str) -> None:
    x = normal(*lead, 32)
    layers = [ColumnLinear(32, 16, dim="ffn", rngs=nnx.Rngs(0)), RowLinear(32, 16, dim="ffn", rngs=nnx.Rngs(0))]
    with jax.set_mesh(mesh_of(mesh)):
        found = jax.device_get([jax.jit(layer)(x) for layer in layers])
    assert differing(found, [x @ np.asarray(layer.kernel[...]) for layer in layers]) == {}


@pytest.mark.parametrize("mesh", MESHES)
def test_mlp_of_one_vector_a_sequence_is_that_of_one_token(mesh: str) -> None:
    mlp, x = MLP(small_config("llama"), rngs=nnx.Rngs(0)), normal(4, 32)
    with jax.set_mesh(mesh_of(mesh)):
        assert differing(jax.device_get(jax.jit(mlp)(x)), jax.device_get(jax.jit(mlp)(x[:, None])[:, 0])) == {}


@pytest.mark.parametrize("dtype", ["int32", "uint8", "uint16", "uint32"])
@pytest.mark.parametrize("mesh", MESHES)
def test_id_outside_of_the_vocabulary_is_nan_on_every_mesh_and_others_are_not(mesh: str, dtype: str) -> None:
    table = normal(64, 4)
    ids = np.array([[0, 63, 64, 200], [1, 2, 3, -1 if dtype == "int32" else 255]])
    with jax.set_mesh(mesh_of(mesh)):
        rows = jax.device_get(jax.jit(lookup)(table, ids.astype(dtype)))
    assert_rows(rows, table, ids)


def test_id_outside_of_the_vocabulary_is_nan_where_the_vocabulary_is_split_by_hand() -> None:
    table, ids = normal(64, 4), np.array([[0, 63, 64, 200], [1, 2, 3, -1]], np.int32)
    run = jax.shard_map(lookup, mesh=mesh_of("data=2,tensor=2"), in_specs=(P("tensor"), P()), out_specs=P())
    assert_rows(jax.device_get(jax.jit(run)(table, ids)), table, ids)


def assert_rows(rows: np.ndarray, table: np.ndarray, ids: np.ndarray) -> None:
    is_word = (ids >= 0) & (ids < 64)
    assert (np.isnan(rows).all(-1) == ~is_word).all()
    assert (rows[is_word] == table[ids[is_word]]).all()


@pytest.mark.parametrize("mesh", MESHES)
def test_target_outside_of_the_vocabulary_spoils_the_loss_unless_it_is_masked(mesh: str) -> None:
    x, table, targets = jnp.asarray(normal(2, 4, 8)), jnp.asarray(normal(64, 8)), ZEROS.copy()
    targets[0, 1], targets[1, 2] = 64, -100
    masked = ONES.copy()
    masked[0, 1] = masked[1, 2] = 0
    run = jax.jit(jax.value_and_grad(projected, argnums=(0, 1)))
    with jax.set_mesh(mesh_of(mesh)):
        spoilt, fine, same = (run(x, table, *rest) for rest in ((targets, ONES), (targets, masked), (ZEROS, masked)))
        logits = jnp.einsum("btd,vd->btv", x, table)
        assert np.isnan(cross_entropy(logits, targets, ONES))
        assert float(cross_entropy(logits, targets, masked)) == float(cross_entropy(logits, ZEROS, masked))
    assert np.isnan(spoilt[0])
    assert np.isnan(spoilt[1][1]).all()
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), fine, same))
