"""A transformer is cut into stages that hold each layer once, in order; parameters are initialised in place."""

import math
import re
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from trellax.layers import ModelConfig, model_rules
from trellax.meshes import ScheduleError
from trellax.pipeline import PipelinedModel, PipelineParams, natural_order, split_transformer

from ..law import mesh_of, natural_params, small_model

WIDE = ModelConfig(vocab_size=1024, num_layers=8, hidden_size=128, num_heads=8, max_tokens=64)
"""Wide enough that parameters outweigh what drawing random numbers needs besides."""


@cache
def split(mesh: str, config: ModelConfig | None = None, *, num_chunks: int = 1) -> PipelinedModel:
    config, devices = config or small_model(), mesh_of(mesh)
    return split_transformer(config, mesh=devices, num_chunks=num_chunks, rules=model_rules(config, devices.shape))


def shapes_of(tree: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), leaf.shape, leaf.dtype) for path, leaf in leaves]


@cache
def initialized(mesh: str, num_chunks: int = 1) -> PipelineParams:
    return split(mesh, num_chunks=num_chunks).init(7)


@cache
def compiled_init(mesh: str) -> Any:
    model = split(mesh, WIDE)
    return jax.jit(model.init, out_shardings=model.shardings).lower(0).compile()


@pytest.mark.parametrize(("num_ranks", "num_chunks"), [(2, 2), (8, 1)])
def test_ranks_hold_every_layer_once_and_in_order(num_ranks: int, num_chunks: int) -> None:
    kernels_LDF = initialized("1x1x1").stages["mlp"]["up"]["kernel"].reshape(8, 64, 256)
    kernels = initialized(f"1x1x{num_ranks}", num_chunks).stages["mlp"]["up"]["kernel"]
    blocks = sorted(kernels.addressable_shards, key=lambda shard: shard.device.id)
    found = [np.asarray(shard.data)[chunk, 0] for chunk in range(num_chunks) for shard in blocks]
    assert np.array_equal(np.concatenate(found), kernels_LDF)


@pytest.mark.parametrize(("mesh", "num_chunks"), [("1x1x1", 1), ("2x2x2", 1), ("1x1x4", 2), ("1x1x8", 1)])
def test_stage_parameters_lead_with_chunks_ranks_and_layers(mesh: str, num_chunks: int) -> None:
    num_ranks = mesh_of(mesh).shape["pipe"]
    leading = {leaf.shape[:3] for leaf in jax.tree.leaves(split(mesh, num_chunks=num_chunks).params.stages)}
    assert leading == {(num_chunks, num_ranks, 8 // num_chunks // num_ranks)}


@pytest.mark.parametrize("mesh", [pytest.param("1x8x1", marks=pytest.mark.slow), "2x2x2", "1x1x8"])
def test_initial_values_do_not_depend_on_the_mesh(mesh: str) -> None:
    def natural(params: PipelineParams) -> dict[str, Any]:
        return jax.device_get({"blocks": natural_order(params.stages), **params.shared})

    same = jax.tree.map(np.array_equal, natural(initialized(mesh)), natural(initialized("1x1x1")))
    assert {jax.tree_util.keystr(path): ok for path, ok in jax.tree_util.tree_leaves_with_path(same) if not ok} == {}


def test_initial_values_depend_on_the_seed() -> None:
    other = split("1x1x1").init(8)
    assert not np.array_equal(initialized("1x1x1").shared["embed"]["table"], other.shared["embed"]["table"])


def test_parameters_are_those_of_the_plain_transformer() -> None:
    config = small_model(embeddings="untied", style="llama")
    model = split("2x2x2", config)
    params = {"blocks": jax.eval_shape(natural_order, model.params.stages), **model.params.shared}
    assert shapes_of(params) == shapes_of(natural_params(config))


@pytest.mark.parametrize("mesh", [pytest.param("1x8x1", marks=pytest.mark.slow), "2x2x2", "1x1x8"])
def test_arrays_are_initialized_with_the_stated_shardings(mesh: str) -> None:
    model, params = split(mesh), initialized(mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == model.shardings
    assert shapes_of(params) == shapes_of(model.params)


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("1x2x4", marks=pytest.mark.slow)])
def test_initialization_gives_a_device_its_own_shards_only(mesh: str) -> None:
    model = split(mesh, WIDE)
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(model.params)]
    expected = sum(4 * math.prod(shape) for shape in shards)
    # XLA adds a pointer for each output.
    slack = 8 * (len(shards) + 1)
    assert 0 <= compiled_init(mesh).memory_analysis().output_size_in_bytes - expected <= slack


@pytest.mark.parametrize("mesh", ["2x2x2", pytest.param("1x2x4", marks=pytest.mark.slow)])
def test_no_device_holds_a_full_array_at_initialization(mesh: str) -> None:
    model = split(mesh, WIDE)
    largest_shard = max(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(model.params))
    shapes = re.findall(r"[a-z]+[0-9]*\[([0-9,]+)\]", compiled_init(mesh).as_text())
    assert max(math.prod(map(int, shape.split(","))) for shape in shapes) <= largest_shard


def test_split_refuses_layers_that_do_not_divide() -> None:
    with pytest.raises(ScheduleError, match="num_layers=8 does not split over 4 ranks x 3 chunks = 12 stages"):
        split("1x1x4", num_chunks=3)
