"""The table of shardings says of every array what one device holds, allocated or not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.meshes import DEFAULT_RULES, MeshSpec, build_mesh, sharding_table

MESH = build_mesh(MeshSpec(data=2, tensor=2, pipe=2))


def shape_of(*shape: int, dims: tuple[str, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    sharding = DEFAULT_RULES.sharding(dims, shape=shape, mesh=MESH)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


TREE = {
    "embed": {"table": shape_of(256, 64, dims=("vocab", "embed"))},
    "mlp": {
        "up": shape_of(2, 4, 64, 256, dims=("stage", "layer", "embed", "ffn")),
        "bias": shape_of(2, 4, 256, dims=("stage", "layer", "ffn"), dtype=jnp.bfloat16),
    },
    "step": shape_of(dims=(), dtype=jnp.int32),
}


def test_table_shows_names_axes_and_bytes(golden: Callable[[str, str], None]) -> None:
    golden("sharding_table.txt", str(sharding_table(TREE)))


def test_sums_are_those_of_the_rows() -> None:
    table = sharding_table(TREE)
    assert table.total_bytes == 4 * (256 * 64 + 2 * 4 * 64 * 256 + 1) + 2 * 2 * 4 * 256
    assert table.device_bytes == 4 * (256 * 64 // 2 + 2 * 4 * 64 * 256 // 4 + 1) + 2 * 2 * 4 * 256 // 4


def test_shapes_and_arrays_give_the_same_table() -> None:
    arrays = jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), TREE)
    assert sharding_table(arrays) == sharding_table(TREE)


def test_bytes_of_a_device_are_those_of_its_shard() -> None:
    array = jax.device_put(jnp.zeros((8, 32)), TREE["embed"]["table"].sharding)
    assert sharding_table([array]).device_bytes == array.addressable_shards[0].data.nbytes


def test_dimension_over_two_axes_names_both() -> None:
    split = NamedSharding(MESH, P(("data", "tensor")))
    row = sharding_table([jax.ShapeDtypeStruct((8, 3), "float32", sharding=split)]).rows[0]
    assert (row.shape, row.device_bytes) == ("[8@data+tensor, 3]", 24)


def test_array_on_one_device_is_whole() -> None:
    row = sharding_table({"x": jnp.zeros((2, 3))}).rows[0]
    assert (row.name, row.shape, row.device_bytes) == ("x", "[2, 3]", 24)


def test_tree_without_arrays_has_an_empty_table() -> None:
    table = sharding_table({})
    assert (table.total_bytes, table.device_bytes) == (0, 0)
    assert "total" in str(table)
