"""The law of inference: decoding with a cache equals recomputing everything on one device, at every position."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.layers import Head, ModelConfig, NewTokens
from trellax.layers.attention import cache as cache_module
from trellax.layers.attention.cache import CacheDtype, cache_shapes
from trellax.layers.quantized import Weights
from trellax.layers.vocabulary import LEAST_LOGIT
from trellax.meshes import MeshAxes, ShardingRules, mesh_sizes
from trellax.meshes.axes import KNOWN_ROLES
from trellax.serve.experts import MOST_TOKENS, with_room
from trellax.serve.load import quantize_params
from trellax.serve.params import stage_params, stage_shapes
from trellax.serve.stage import Stage, block_specs
from trellax.serve.state import empty_state

from .models import logits_of, mesh_of, model_of, params_on

TOLERANCE = 2e-5
"""Relative to the largest logit, in float32: sums over devices, and over a row of the cache, in another order."""

CUTS = (0, 5, 6, 7, 10)
"""A chunk of a prompt, two tokens one by one, another chunk."""

PAGES = 7
"""Pages of a sequence, of two tokens each."""

MESHES = ["data=1", "tensor=2", "data=2", "pipe=2", "tensor=4", "pipe=4", "data=2,tensor=2", "tensor=2,pipe=2"]
SPLIT = ["expert=2", "expert=2,tensor=2", "data=2,expert=2,pipe=2", "expert=4,tensor=2"]
"""Meshes of models with experts; a row a device leaves all experts of a token to the sum."""
LARGE = ["tensor=8", "data=2,tensor=2,pipe=2", "data=2,pipe=4", "tensor=4,pipe=2", "data=4,tensor=2"]
YARN: dict[str, Any] = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 8, "rope_mscale_all": 1.0}
YARN |= {"rope_high_frequency_factor": 2.0}
BY_LAYER: dict[str, Any] = {"attention_pattern": ("window", "full", "unrotated"), "attention_window": 6}
BY_LAYER |= {"window_rope_theta": 100.0, "attention_softcap": 1.5, "logit_softcap": 8.0, "norm_place": "both"}
BY_LAYER |= {"embedding_scale": 2.0, "residual_scale": 0.5, "attention_scale": 0.4, "logit_scale": 0.5}
SINKS: dict[str, Any] = {"attention_sinks": "on", "mlp": "clamped_swiglu", "bias": "on", "router_bias": "trained"}
SINKS |= {"attention_pattern": ("window", "full"), "attention_window": 6, "shared_size": 0}
LONGROPE: dict[str, Any] = {"rope_scaling": "longrope", "rope_factor": 3.0, "rope_original_tokens": 8}
LONGROPE |= {"rope_short_factors": (1.0, 1.5), "rope_long_factors": (2.0, 6.0)}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "one_kv_head": ("llama", {"num_kv_heads": 1}),
    "qwen3_with_window": ("llama", {"qk_norm": "on", "attention_window": 6}),
    "attention_by_layer": ("llama", BY_LAYER),
    "norm_of_all_heads": ("llama", {"qk_norm": "whole", "norm_place": "after", "num_kv_heads": 1}),
    "unequal_stages": ("gpt", {"num_layers": 5}),
    "padded_vocabulary": ("gpt", {"vocab_size": 65, "logit_softcap": 8.0}),
    "experts": ("experts", {}),
    "experts_in_rounds": ("experts", {}),
    "sinks": ("experts", SINKS),
    "longrope": ("llama", LONGROPE),
    "dense_and_experts": ("dense_and_experts", {}),
    "latents": ("latents", {}),
    "latents_with_window": ("latents", {"query_latent_size": 0, "attention_window": 6, **YARN}),
}
SAMPLE = [
    ("data=1", "qwen3_with_window"),
    ("tensor=4", "one_kv_head"),
    ("pipe=2", "attention_by_layer"),
    ("pipe=2", "unequal_stages"),
    ("pipe=4", "llama"),
    ("data=2,tensor=2,pipe=2", "gpt"),
    ("tensor=2,pipe=2", "experts"),
    ("data=2,tensor=2", "experts_in_rounds"),
    ("data=2,expert=2,pipe=2", "dense_and_experts"),
    ("tensor=2,pipe=2", "dense_and_experts"),
    ("tensor=2,pipe=2", "latents"),
    ("data=2,tensor=2", "latents_with_window"),
]


def shapes_of(config: ModelConfig, mesh: Mesh, *, num_rows: int, dtype: CacheDtype, stage: Stage) -> Any:
    """A cache with room for all rows, in pages of two tokens."""
    stacks = tuple(own.size for own in stage.stacks)
    sizes = {"num_rows": num_rows, "num_pages": PAGES * num_rows, "page": 2}
    rules = ShardingRules.of(axes_of(mesh))
    return cache_shapes(config, mesh=mesh, dtype=dtype, stacks=stacks, rules=rules, **sizes)


def axes_of(mesh: Mesh) -> MeshAxes:
    """The axes of a mesh with default names."""
    return MeshAxes(roles=tuple((name, KNOWN_ROLES[name]) for name in mesh.axis_names))


def cached_logits(
    config: ModelConfig,
    *,
    mesh: Mesh,
    tokens_BT: np.ndarray,
    dtype: CacheDtype = "float32",
    weights: Weights = "plain",
) -> np.ndarray:
    """Logits [B, T, V] by the parts that the engine is made of, one piece of the sequences after another."""
    axes, num_ranks = axes_of(mesh), mesh.shape["pipe"]
    own: dict[str, Any] = {"config": config, "mesh": mesh, "axes": axes, "weights": weights}
    stage = Stage(**own)
    shapes = shapes_of(config, mesh, num_rows=len(tokens_BT), dtype=dtype, stage=stage)
    # Each row has its pages all over those of its shard.
    num_rows = len(tokens_BT) // mesh_sizes(mesh, axes=axes).data
    pages = np.random.default_rng(1).permutation(PAGES * num_rows).reshape(num_rows, PAGES)

    def run(params: Any, cache: Any, tokens_bT: jax.Array) -> jax.Array:
        found = []
        for start, end in pairwise(CUTS):
            size = end - start
            new = NewTokens(
                row=0,
                starts=stage.vary(jnp.full(len(tokens_bT), start)),
                counts=stage.vary(jnp.full(len(tokens_bT), size)),
                pages=stage.vary(jnp.asarray(pages)),
            )
            x = stage.embed(params, stage.vary(tokens_bT[:, start:end]), new.positions(size))
            for rank in range(num_ranks):
                work = partial(stage.run_layers, params, x, cache=cache, new=new)
                x, cache = stage.on_rank(rank, work, lambda x=x, cache=cache: (x, cache))
                x = stage.pass_on(x, shape="ring")
            # Round the ring: the first rank has it now.
            found.append(jnp.where(stage.rank == 0, logits_by(stage, params, x), 0))
        whole = jnp.concatenate(found, axis=1)
        return jax.lax.psum(whole, "pipe") if num_ranks > 1 else whole

    params = stage_params(quantize_params(params_on(config, mesh, axes), **own)[0], **own)
    specs = block_specs((stage_shapes(**own), shapes), mesh)
    return run_on_shards(run, mesh, specs, (params, empty_state(shapes)), tokens_BT)


def logits_by(stage: Stage, params: Any, x: jax.Array) -> jax.Array:
    head: Head = nnx.merge(stage._graphs["head"], params["head"])
    return head(x, embedding_VD=params["embed"]["table"])


def run_on_shards(run: Any, mesh: Mesh, specs: Any, args: tuple[Any, Any], tokens_BT: np.ndarray) -> np.ndarray:
    """Run a function on every device's part of its arguments and of the sequences, and return all logits."""
    data = tuple(axis for axis in axes_of(mesh).batch if mesh.shape[axis] > 1) or None
    tensor = "tensor" if mesh.shape["tensor"] > 1 else None
    mapped = jax.shard_map(
        run, mesh=mesh, in_specs=(*specs, P(data)), out_specs=P(data, None, tensor), axis_names=set(mesh.axis_names)
    )
    tokens = jax.device_put(tokens_BT, NamedSharding(mesh, P(data)))
    return np.asarray(jax.jit(mapped)(*args, tokens))


def check(mesh: str, kind: str) -> None:
    style, changes = KINDS[kind]
    tokens_BT = np.random.default_rng(0).integers(0, 64, (4, CUTS[-1])).astype(np.int32)
    config = with_room(model_of(style, **changes), num_tokens=MOST_TOKENS + 1 if kind == "experts_in_rounds" else 1)
    actual = cached_logits(config, mesh=mesh_of(mesh), tokens_BT=tokens_BT)
    expected = logits_of(model_of(style, **changes), tokens_BT)
    actual, padding = np.split(actual, [expected.shape[-1]], axis=-1)
    assert (padding == LEAST_LOGIT).all()
    assert np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(("mesh", "kind"), SAMPLE)
def test_decoding_equals_full_recomputation_at_every_position(mesh: str, kind: str) -> None:
    check(mesh, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mesh", MESHES + LARGE)
def test_decoding_equals_full_recomputation_on_all_meshes(mesh: str, kind: str) -> None:
    check(mesh, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["experts", "experts_in_rounds", "dense_and_experts"])
@pytest.mark.parametrize("mesh", SPLIT)
def test_split_experts_equal_full_recomputation(mesh: str, kind: str) -> None:
    check(mesh, kind)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["llama", "latents"])
def test_a_cache_in_fp8_costs_the_rounding_of_keys_and_values_alone(
    style: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens_BT = np.random.default_rng(0).integers(0, 64, (4, CUTS[-1])).astype(np.int32)
    run = partial(cached_logits, model_of(style), mesh=mesh_of("tensor=2,pipe=2"), tokens_BT=tokens_BT)
    narrow, whole = run(dtype="fp8"), run(dtype="float32")

    def round_first(x: jax.Array, _dtype: Any) -> jax.Array:
        scale = jnp.abs(x).max(-1, keepdims=True) / 448
        return (x / scale).astype("float8_e4m3fn").astype(x.dtype) * scale

    monkeypatch.setattr(cache_module, "_encode", round_first)
    expected = run(dtype="float32")
    assert np.abs(narrow - expected).max() <= TOLERANCE * np.abs(expected).max()
    # What it costs: a number is rounded by 2.6% of itself, in the root of the mean square.
    assert 0.001 < np.abs(narrow - whole).max() / np.abs(whole).max() < 0.2


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_bfloat16_cache_costs_the_rounding_of_keys_and_values_alone(
    compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded before they go to a float32 cache they give the same, to the law; bfloat16 ones are rounded already."""
    tokens_BT = np.random.default_rng(0).integers(0, 64, (4, CUTS[-1])).astype(np.int32)
    config, mesh = model_of("llama", dtype=compute), mesh_of("tensor=2,pipe=2")
    run = partial(cached_logits, config, mesh=mesh, tokens_BT=tokens_BT)
    rounded, whole = run(dtype="bfloat16"), run(dtype="float32")
    assert (rounded == whole).all() == (compute == "bfloat16")

    def round_first(x: jax.Array, dtype: Any) -> jax.Array:
        return x.astype(jnp.bfloat16).astype(dtype)

    monkeypatch.setattr(cache_module, "_encode", round_first)
    expected = run(dtype="float32")
    assert np.abs(rounded - expected).max() <= TOLERANCE * np.abs(expected).max()
