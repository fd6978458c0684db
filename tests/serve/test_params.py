"""Parameters as readers deliver them and as devices hold them: sizes, shardings and copies."""

import jax
import numpy as np
import pytest
from trellax.layers import bytes_per_device
from trellax.layers.attention.cache import cache_shapes
from trellax.serve.params import param_shapes, stage_params, stage_shapes
from trellax.serve.stacks import layers_of_stages
from trellax.serve.state import Sizes, empty_state, state_shapes

from .models import mesh_of, model_of, numbers_of, params_on

MESH = "data=2,tensor=2,pipe=2"


def held_by_each(tree: object) -> set[int]:
    """Bytes that each device really holds of a tree of arrays."""
    total: dict[int, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            total[shard.device.id] = total.get(shard.device.id, 0) + shard.data.nbytes
    return set(total.values())


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_per_device_are_those_of_the_arrays(style: str, dtype: str) -> None:
    config, mesh = model_of(style, dtype=dtype), mesh_of(MESH)
    sizes = Sizes(slots=8, max_tokens=24, groups=2, num_shards=2, chunk=4, items=2, rounds=2, page=8)
    shapes = state_shapes(config, sizes, mesh=mesh, cache_dtype="bfloat16")
    state, params = empty_state(shapes), stage_params(params_on(config, mesh), config=config, mesh=mesh)
    assert held_by_each(state.cache) == {bytes_per_device(shapes.cache)}
    assert held_by_each(params) == {bytes_per_device(stage_shapes(config, mesh=mesh))}
    heads = max(config.num_kv_heads, 2) // 2
    # Keys and values of two layers, four rows and the device's heads, two bytes each; and a length for each row.
    assert bytes_per_device(shapes.cache) == 2 * 2 * 4 * heads * 24 * 4 * 2 + 4 * 4


def test_every_device_has_a_head_where_there_are_fewer() -> None:
    config, mesh = model_of("llama", num_kv_heads=1), mesh_of("tensor=4")
    (keys,) = cache_shapes(config, mesh=mesh, num_rows=2, num_pages=6, page=8, dtype="float32", stacks=(4,)).keys
    assert keys.sharding.shard_shape(keys.shape) == (4, 6, 1, 8, 4)
    params = stage_params(params_on(config, mesh), config=config, mesh=mesh)
    kernel = params["blocks"][0]["attention"]["qkv"]["kernel"]
    own = numbers_of(config)["blocks"]["attention"]["key"]["kernel"]
    for shard in kernel.addressable_shards:
        # Two heads of queries of size 4, then the one key, then the one value.
        assert np.array_equal(shard.data[0, ..., 8:12], own)


def test_layers_go_to_stages_in_order_and_none_is_lost() -> None:
    config, mesh = model_of("gpt", num_layers=5), mesh_of("pipe=2")
    counts = layers_of_stages(config, num_ranks=2)
    assert sum(counts) == 5
    own = numbers_of(config)["blocks"]["mlp"]["up"]["kernel"]
    held = stage_params(params_on(config, mesh), config=config, mesh=mesh)["blocks"][0]["mlp"]["up"]["kernel"]
    assert np.array_equal(held[0, : counts[0]], own[: counts[0]])
    assert np.array_equal(held[1, : counts[1]], own[counts[0] :])


def test_a_heavy_vocabulary_takes_layers_from_the_last_stage() -> None:
    light, heavy = (model_of("gpt", vocab_size=size, num_layers=8) for size in (64, 4096))
    assert layers_of_stages(light, num_ranks=2) == (4, 4)
    first, last = layers_of_stages(heavy, num_ranks=2)
    assert first > last
    assert layers_of_stages(heavy, num_ranks=1) == (8,)


def test_param_shapes_are_sharded_over_all_axes() -> None:
    config = model_of("llama")
    whole = bytes_per_device(param_shapes(config, mesh=mesh_of("data=1")))
    split = bytes_per_device(param_shapes(config, mesh=mesh_of("tensor=4,pipe=2")))
    assert split < whole / 5
    uneven = param_shapes(model_of("gpt", num_layers=5), mesh=mesh_of("pipe=2"))
    kernel = uneven["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (5, 16, 128)
