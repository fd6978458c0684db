"""Flax's partitioning metadata says of our parameters what our rules say, and places a user's own model on a mesh."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trellax.layers import (
    MLP,
    Attention,
    Block,
    ColumnLinear,
    Embedding,
    Head,
    RowLinear,
    Transformer,
    init_model,
    model_rules,
    param_dims,
    place_model,
)
from trellax.layers.joined_linear import JoinedLinear
from trellax.meshes import DEFAULT_RULES, MeshError, MeshSpec, ModelError, ShardingError, ShardingRules, abstract_mesh

from .sharded import TOLERANCE, differing, mesh_of, normal, small_config

SPLIT_VOCAB = DEFAULT_RULES.replace(vocab=("pipe", "tensor"), layer="pipe")
GROUPED = small_config("qwen", num_kv_heads=2, embeddings="untied")
LAYERS: dict[str, Callable[[ShardingRules], nnx.Module]] = {
    "column": lambda rules: ColumnLinear(8, 16, dim="ffn", rngs=nnx.Rngs(0), rules=rules),
    "row": lambda rules: RowLinear(16, 8, dim="heads", rngs=nnx.Rngs(0), rules=rules),
    "joined": lambda rules: JoinedLinear(
        [ColumnLinear(8, size, dim="ffn", rngs=nnx.Rngs(0), rules=rules) for size in (16, 8)]
    ),
    "mlp": lambda rules: MLP(GROUPED, rngs=nnx.Rngs(0), rules=rules),
    "attention": lambda rules: Attention(GROUPED, rngs=nnx.Rngs(0), rules=rules),
    "block": lambda rules: Block(small_config("gpt"), rngs=nnx.Rngs(0), rules=rules),
    "embedding": lambda rules: Embedding(small_config("gpt"), rngs=nnx.Rngs(0), rules=rules),
    "head": lambda rules: Head(GROUPED, rngs=nnx.Rngs(0), rules=rules),
}
RULES = {"default": DEFAULT_RULES, "split_vocab": SPLIT_VOCAB, "grouped": model_rules(GROUPED, {"tensor": 8})}


def specs_of(model: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(model, nnx.Param)))


def spec_of(param: Any) -> Any:
    """The spec of a parameter in its place."""
    return param[...].sharding.spec


def is_dims(node: Any) -> bool:
    return isinstance(node, tuple)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("layer", LAYERS)
def test_flax_reads_from_every_layer_the_specs_of_our_rules(layer: str, rules: str) -> None:
    model = nnx.eval_shape(lambda: LAYERS[layer](RULES[rules]))
    dims = nnx.to_pure_dict(nnx.map_state(lambda _, leaf: leaf.out_sharding, nnx.state(model, nnx.Param)))
    assert specs_of(model) == jax.tree.map(RULES[rules].spec, dims, is_leaf=is_dims)


@pytest.mark.parametrize("name", ["split_vocab", "grouped"])
def test_flax_reads_from_a_whole_transformer_the_specs_of_our_rules(name: str) -> None:
    model = nnx.eval_shape(lambda: Transformer(GROUPED, rngs=nnx.Rngs(0), rules=RULES[name]))
    assert specs_of(model) == jax.tree.map(RULES[name].spec, param_dims(model), is_leaf=is_dims)
    block, head = specs_of(model)["blocks"], specs_of(model)["head"]
    stack, vocab = ("pipe", ("pipe", "tensor")) if name == "split_vocab" else (None, "tensor")
    assert block["mlp"]["up"]["kernel"] == P(stack, None, "tensor")
    assert block["mlp_norm"]["scale"] == P(stack, None)
    assert block["attention"]["key"]["kernel"] == P(stack, None, None if name == "grouped" else "tensor")
    assert head["table"] == P(vocab, None)


def test_flax_shards_our_transformer_by_itself() -> None:
    mesh = mesh_of("data=2,tensor=4")
    with jax.set_mesh(mesh):
        model = nnx.eval_shape(lambda: Transformer(small_config("gpt"), rngs=nnx.Rngs(0)))
        shardings = nnx.get_named_sharding(nnx.state(model), mesh)
    kernel = nnx.to_pure_dict(shardings)["blocks"]["mlp"]["down"]["kernel"]
    assert kernel.shard_shape((2, 128, 32)) == (2, 32, 32)


class TwoLayers(nnx.Module):
    """A plain Flax model: one kernel by logical names, one by mesh axes, the norm without any annotation."""

    def __init__(self, *, rngs: nnx.Rngs, down: tuple[Any, ...] = ("tensor", None), features: int = 32) -> None:
        init = nnx.initializers.normal(0.1)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(
            16,
            features,
            kernel_init=nnx.with_partitioning(init, ("embed", "ffn")),
            bias_init=nnx.with_partitioning(init, ("ffn",)),
            rngs=rngs,
        )
        self.down = nnx.Linear(features, 16, kernel_metadata={"out_sharding": down}, kernel_init=init, rngs=rngs)

    def loss(self, x: jax.Array) -> jax.Array:
        return jnp.square(self.down(jax.nn.gelu(self.up(self.norm(x))))).mean()


def build(**options: Any) -> TwoLayers:
    with nnx.use_eager_sharding(False):
        return TwoLayers(rngs=nnx.Rngs(0), **options)


def loss_and_grads(model: nnx.Module, x: Any) -> dict[str, Any]:
    with jax.numpy_rank_promotion("allow"):
        loss, grads = nnx.jit(nnx.value_and_grad(lambda model, x: model.loss(x)))(model, x)
    return jax.device_get({"loss": loss, "grads": nnx.to_pure_dict(grads)})


@cache
def expected() -> dict[str, Any]:
    return loss_and_grads(build(), normal(8, 16))


def test_our_transformer_initialized_as_any_flax_model_matches_one_device() -> None:
    mesh, rng = mesh_of("data=2,tensor=4"), np.random.default_rng(0)
    rules = model_rules(GROUPED, mesh.shape)
    tokens, targets = (rng.integers(0, GROUPED.vocab_size, (4, 8)).astype(np.int32) for _ in range(2))
    weights = np.full((4, 8), 1 / 32, np.float32)

    def answer(model: Transformer) -> dict[str, Any]:
        loss = nnx.value_and_grad(lambda model, *batch: model.loss(*batch))
        value, grads = nnx.jit(loss)(model, tokens, targets, weights)
        return jax.device_get({"loss": value, "grads": nnx.to_pure_dict(grads)})

    expected = answer(Transformer(GROUPED, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        model = init_model(lambda: Transformer(GROUPED, rngs=nnx.Rngs(0), rules=rules), mesh=mesh)
        assert nnx.to_pure_dict(nnx.state(model))["head"]["table"].sharding.shard_shape((64, 32)) == (16, 32)
        assert differing(answer(model), expected) == {}


@pytest.mark.parametrize("way", ["placed", "born"])
@pytest.mark.parametrize("mesh", ["tensor=8", "data=2,tensor=2,pipe=2"])
def test_loss_and_gradients_of_a_placed_model_match_one_device(mesh: str, way: str) -> None:
    devices = mesh_of(mesh)
    model = place_model(build(), mesh=devices) if way == "placed" else init_model(build, mesh=devices)
    x = jax.device_put(normal(8, 16), DEFAULT_RULES.sharding(("batch", None), shape=(8, 16), mesh=devices))
    assert differing(loss_and_grads(model, x), expected(), tolerance=TOLERANCE) == {}


def test_annotations_split_and_the_rest_is_whole_on_every_device() -> None:
    mesh = mesh_of("data=2,tensor=4")
    for model in (place_model(build(), mesh=mesh), init_model(build, mesh=mesh)):
        held = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, nnx.to_pure_dict(nnx.state(model)))
        assert held["up"] == {"kernel": (16, 8), "bias": (8,)}
        assert held["down"] == {"kernel": (8, 16), "bias": (16,)}
        assert held["norm"] == {"scale": (16,), "bias": (16,)}


def test_initial_values_of_a_model_are_those_of_one_device() -> None:
    born = nnx.to_pure_dict(nnx.state(init_model(build, mesh=mesh_of("tensor=8"))))
    whole = nnx.to_pure_dict(nnx.state(init_model(build, mesh=mesh_of("tensor=1"))))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), born, whole)


def test_initialized_model_is_never_whole_on_a_device() -> None:
    mesh = mesh_of("tensor=8")
    placed = nnx.state(place_model(nnx.eval_shape(build), mesh=mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    text = jax.jit(lambda: nnx.split(build())[1], out_shardings=shardings).lower().compile().as_text() or ""
    assert "f32[16,4]" in text
    assert "f32[16,32]" not in text


def test_model_of_shapes_is_placed_without_devices() -> None:
    mesh = abstract_mesh(MeshSpec(tensor=16, data=4))
    placed = place_model(nnx.eval_shape(build), mesh=mesh)
    leaf = placed.up.kernel.get_value()
    assert isinstance(leaf, jax.ShapeDtypeStruct)
    assert leaf.sharding is not None
    assert (leaf.sharding.spec, leaf.sharding.shard_shape(leaf.shape)) == (P(None, "tensor"), (16, 2))


def test_own_rules_of_a_parameter_come_before_those_of_the_call() -> None:
    mesh = mesh_of("tensor=4")
    for own, expected_spec in ((None, P(None, None)), (DEFAULT_RULES, P(None, "tensor"))):
        options: dict[str, Any] = {} if own is None else {"sharding_rules": own.table}
        param = nnx.Param(jnp.ones((4, 8)), out_sharding=("embed", "ffn"), eager_sharding=False, **options)
        model = nnx.Dict(kernel=param)
        placed = place_model(model, mesh=mesh, rules=DEFAULT_RULES.replace(ffn=None))
        assert spec_of(placed.kernel) == expected_spec


def test_one_dimension_over_two_axes_and_an_axis_that_the_mesh_lacks() -> None:
    flat = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    kernel = place_model(build(down=(("data", "tensor"),)), mesh=flat).down.kernel
    assert kernel[...].sharding.shard_shape((32, 16)) == (8, 16)
    rules = DEFAULT_RULES.replace(ffn=("pipe", "tensor"))
    assert spec_of(place_model(build(), mesh=flat, rules=rules).up.kernel) == P(None, "tensor")


def test_random_keys_and_statistics_are_replicated() -> None:
    def make() -> nnx.Dict:
        return nnx.Dict(norm=nnx.BatchNorm(8, rngs=nnx.Rngs(0)), drop=nnx.Dropout(0.5, rngs=nnx.Rngs(1)))

    for model in (place_model(make(), mesh=mesh_of("tensor=8")), init_model(make, mesh=mesh_of("tensor=8"))):
        leaves = jax.tree.leaves(nnx.split(model)[1])
        assert len(leaves) == 6
        assert all(leaf.sharding.is_fully_replicated and leaf.sharding.num_devices == 8 for leaf in leaves)


MISTAKES: dict[str, dict[str, Any]] = {
    "unknown_name": {"down": ("fnn", None)},
    "axis_twice": {"down": ("tensor", "ffn")},
    "does_not_divide": {"features": 36},
    "too_many_names": {"down": ("tensor", None, None)},
}


@pytest.mark.parametrize("way", ["placed", "shapes", "born"])
@pytest.mark.parametrize("name", MISTAKES)
def test_annotation_that_cannot_hold_is_refused(name: str, way: str, golden: Callable[[str, str], None]) -> None:
    mesh, make = mesh_of("tensor=8"), partial(build, **MISTAKES[name])
    model = build(**MISTAKES[name]) if way == "placed" else nnx.eval_shape(make)
    place: Callable[..., Any] = partial(place_model, model) if way != "born" else partial(init_model, make)
    with pytest.raises(ShardingError) as caught:
        place(mesh=mesh)
    golden(f"errors/layers/place_{name}.txt", str(caught.value))


def test_arrays_on_a_mesh_without_devices_are_refused(golden: Callable[[str, str], None]) -> None:
    with pytest.raises(MeshError) as caught:
        place_model(build(), mesh=abstract_mesh(MeshSpec(tensor=8)))
    golden("errors/layers/place_no_devices.txt", str(caught.value))


def test_mesh_of_other_axes_is_refused() -> None:
    other = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ShardingError, match="unknown mesh axis 'fsdp'"):
        place_model(build(), mesh=other)


def test_model_that_is_not_a_module_is_refused() -> None:
    state: Any = {"kernel": jnp.ones(2)}
    with pytest.raises(ModelError, match=r"give a flax\.nnx\.Module"):
        place_model(state, mesh=mesh_of("tensor=2"))
