"""The planner and the inspector count attention from latents as the model, its cache and its programs have it."""

import math
from typing import Any

import jax
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer, bytes_per_device
from trellax.layers.attention.cache import cache_shapes
from trellax.meshes import MeshSpec, build_mesh
from trellax.plan.costs.device_params import block_params
from trellax.plan.costs.layer_time import layer_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.runtime import TRELLAX
from trellax.plan.costs.serving.held import kv_bytes_per_token
from trellax.plan.machines.topology import read_topology
from trellax.programs.traffic import EVERY_KIND

from ..programs.steps import report_of

SIZES: dict[str, Any] = {"vocab_size": 1024, "num_layers": 4, "hidden_size": 256, "num_heads": 8, "max_tokens": 512}
STYLE: dict[str, Any] = {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off", "dtype": "bfloat16"}
LATENTS: dict[str, Any] = {"head_size": 48, "rope_head_size": 16, "latent_size": 64, "query_latent_size": 96}
MODEL = ModelConfig(**SIZES, **STYLE, **LATENTS)
MESH = MeshSpec(tensor=2, pipe=2)


@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_of_a_block_are_those_on_a_device(tensor: int) -> None:
    model = nnx.eval_shape(lambda: Transformer(MODEL, rngs=nnx.Rngs(0)))
    state = nnx.state(model.blocks, nnx.Param)
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, nnx.Variable))
    is_split = [bool({"heads", "ffn"} & set(leaf.get_metadata("out_sharding"))) for leaf in leaves]
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    on_device = sum(size // tensor if split else size for size, split in zip(sizes, is_split, strict=True))
    assert MODEL.num_layers * block_params(MODEL, tensor=tensor) == on_device


def test_cached_bytes_are_those_of_the_cache() -> None:
    mesh = build_mesh(MESH, devices=jax.devices()[:4])
    shapes = cache_shapes(MODEL, mesh=mesh, num_rows=3, num_pages=24, page=16, dtype="bfloat16", stacks=(2,))
    lengths = 3 * 4
    assert bytes_per_device(shapes) - lengths == 2 * 24 * 16 * kv_bytes_per_token(MODEL, tensor=2)
    # Keys and values of all heads would be 48 + 32 features of each.
    assert kv_bytes_per_token(MODEL, tensor=1) == 2 * (64 + 16)


def test_less_is_sent_over_tensor_than_by_attention_from_x() -> None:
    sizes: dict[str, Any] = {"layout": Layout(tensor=8), "runtime": TRELLAX, "num_tokens": 65_536}
    topology = read_topology("h200x8/8")
    usual = ModelConfig(**SIZES, **STYLE)
    found, expected = (layer_time(model, topology=topology, **sizes).exposed for model in (MODEL, usual))
    assert 0 < found < expected


WORDS = (
    "--model.positions rotary --model.norm rmsnorm --model.bias off --model.head_size 12 --model.rope_head_size 4 "
    "--model.value_head_size 8 --model.latent_size 16 --model.query_latent_size 12"
)


@pytest.mark.parametrize("mesh", ["2x2x1", pytest.param("2x2x2", marks=pytest.mark.slow)])
def test_a_step_sends_the_minimum(mesh: str) -> None:
    report = report_of(mesh, f"{WORDS} --mesh.sequence off")
    ratios = {row.axis: round(row.ratio, 2) for row in report.traffic if row.kind == EVERY_KIND and row.ratio}
    assert set(ratios.values()) == {1.0}
    assert {"data", "tensor"} <= ratios.keys()
    assert [row for row in report.traffic if row.axis == "unattributed"] == []


@pytest.mark.slow
def test_sequence_parallelism_gathers_latents_and_not_x() -> None:
    report = report_of("2x2x1", WORDS)
    (ratio,) = [row.ratio for row in report.traffic if row.kind == EVERY_KIND and row.axis == "tensor"]
    assert ratio is not None
    assert 1.1 < ratio <= 1.25
