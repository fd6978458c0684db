"""Sharding rules turn dimension names into mesh axes, and refuse what cannot be split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import DEFAULT_RULES, MeshSpec, ShardingError, ShardingRules, build_mesh
from trellax.meshes.spec import AXES

MESH = build_mesh(MeshSpec(data=2, tensor=4))

MISTAKES: dict[str, Callable[[], Any]] = {
    "collision": lambda: DEFAULT_RULES.spec(("heads", "ffn")),
    "unknown_dim": lambda: DEFAULT_RULES.spec(("embed", "head_count")),
    "mistyped_dim": lambda: DEFAULT_RULES.axes("vocabulary"),
    "unknown_axis": lambda: DEFAULT_RULES.replace(ffn="tenso"),
    "does_not_divide": lambda: DEFAULT_RULES.sharding(("embed", "ffn"), shape=(32, 30), mesh=MESH, name="mlp.up"),
    "missing_names": lambda: DEFAULT_RULES.sharding(("embed",), shape=(32, 30), mesh=MESH, name="mlp.up"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_rule_that_cannot_hold_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(ShardingError) as caught:
        MISTAKES[name]()
    golden(f"errors/meshes/rules_{name}.txt", str(caught.value))


@pytest.mark.parametrize(
    ("dims", "expected"),
    [
        (("embed", "ffn"), P(None, "tensor")),
        (("vocab", "embed"), P("tensor", None)),
        (("batch", "tokens", "embed"), P("data", None, None)),
        (("chunk", "stage", "layer", "embed", "heads"), P(None, "pipe", None, None, "tensor")),
        ((None, "batch"), P(None, "data")),
        ((), P()),
    ],
)
def test_default_rules_place_every_kind_of_array(dims: tuple[str, ...], expected: P) -> None:
    assert DEFAULT_RULES.spec(dims) == expected


def test_replacing_a_rule_makes_new_rules_and_leaves_the_old() -> None:
    moved = DEFAULT_RULES.replace(ffn=None, expert="data")
    assert (moved.axes("ffn"), moved.axes("expert"), DEFAULT_RULES.axes("ffn")) == ((), ("data",), ("tensor",))


def test_rules_are_values_that_compare_and_hash() -> None:
    again = ShardingRules(table=DEFAULT_RULES.table)
    assert again == DEFAULT_RULES
    assert hash(again) == hash(DEFAULT_RULES)
    assert DEFAULT_RULES.replace(ffn=None) != DEFAULT_RULES


def test_default_rules_use_every_axis() -> None:
    assert {axis for _, axis in DEFAULT_RULES.table if axis} == set(AXES)


def test_sharding_gives_each_device_its_block() -> None:
    sharding = DEFAULT_RULES.sharding(("batch", "ffn"), shape=(8, 32), mesh=MESH)
    assert sharding.shard_shape((8, 32)) == (4, 8)


def test_axis_that_the_mesh_lacks_splits_nothing() -> None:
    DEFAULT_RULES.check(("embed", "ffn"), shape=(32, 30), sizes={"data": 4}, name="mlp.up")


def test_constraint_without_a_mesh_leaves_the_array_alone() -> None:
    x = jnp.ones((8, 32))
    assert DEFAULT_RULES.constrain(x, ("batch", "ffn")) is x


def test_constraint_places_an_array_on_the_mesh_of_the_context() -> None:
    with jax.set_mesh(MESH):
        x = jax.jit(lambda x: DEFAULT_RULES.constrain(x, ("batch", "ffn")))(jnp.ones((8, 32)))
    assert x.sharding.shard_shape(x.shape) == (4, 8)


def test_constraint_leaves_out_axes_that_are_manual_or_of_size_one() -> None:
    seen: dict[str, Any] = {}

    def body(x: jax.Array) -> jax.Array:
        seen["axes"] = [DEFAULT_RULES.auto_axes(dim) for dim in ("batch", "ffn", "stage", "embed", None)]
        return DEFAULT_RULES.constrain(x, ("batch", "ffn"))

    x = jnp.ones((8, 32))
    jax.jit(jax.shard_map(body, mesh=MESH, in_specs=P("data"), out_specs=P("data"), axis_names={"data"}))(x)
    assert seen == {"axes": [(), ("tensor",), (), (), ()]}


def test_a_dimension_may_be_split_over_two_axes_the_first_outermost() -> None:
    rules = DEFAULT_RULES.replace(vocab=("data", "tensor"))
    x = jax.device_put(jnp.arange(16), rules.sharding(("vocab",), shape=(16,), mesh=MESH))
    sizes = MESH.shape["data"], MESH.shape["tensor"]
    for (*_, data, tensor), device in np.ndenumerate(MESH.devices):
        (shard,) = [shard for shard in x.addressable_shards if shard.device == device]
        assert int(shard.data[0]) == (data * sizes[1] + tensor) * 16 // (sizes[0] * sizes[1])
