"""Small models, their answers by full recomputation, and engines, for the tests of this folder."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from trellax.layers import ModelConfig, Transformer
from trellax.meshes import MeshAxes, MeshSpec, build_mesh
from trellax.meshes.axes import DEFAULT_AXES
from trellax.serve import Engine, Request, param_shapes
from trellax.serve.sampling.choose import choose
from trellax.serve.sampling.settings import SamplingSettings

MAX_TOKENS = 24

STYLES: dict[str, dict[str, Any]] = {
    "gpt": {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "bias": "on", "embeddings": "tied"},
    "llama": {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off", "embeddings": "untied"},
}
STYLES["uneven"] = STYLES["llama"] | {"num_layers": 3}
STYLES["experts"] = STYLES["llama"] | {"num_experts": 8, "experts_per_token": 2, "expert_size": 64, "shared_size": 32}
# As trained: half of its mean load is all that an expert has room for. An engine leaves no token out.
STYLES["experts"] |= {"expert_capacity": 0.5, "expert_overflow": "drop"}
STYLES["dense_and_experts"] = STYLES["experts"] | {"num_layers": 5, "dense_layers": 2, "ffn_size": 48}
STYLES["dense_and_experts"] |= {"router": "sigmoid", "router_bias": "on", "router_groups": 4, "router_groups_kept": 2}
STYLES["latents"] = STYLES["llama"] | {"num_kv_heads": 8, "head_size": 12, "rope_head_size": 4, "value_head_size": 6}
STYLES["latents"] |= {"latent_size": 24, "query_latent_size": 16}
STYLES["deepseek"] = STYLES["dense_and_experts"] | STYLES["latents"]
"""The first with as many key/value heads as heads, the second with one for each four."""


@cache
def model_of(style: str, **changes: Any) -> ModelConfig:
    """Four layers of width 32 with 8 heads: every tensor size up to 8 and every pipe size up to 4 fits."""
    sizes: dict[str, Any] = {"vocab_size": 64, "num_layers": 4, "hidden_size": 32, "num_heads": 8}
    sizes |= {"num_kv_heads": 8 if style == "gpt" else 2, "max_tokens": MAX_TOKENS}
    return ModelConfig(**(sizes | STYLES[style] | changes))


@cache
def mesh_of(text: str) -> Mesh:
    """The mesh `data=2,tensor=4` says, on the first of the eight fake devices."""
    spec = MeshSpec.parse(text)
    return build_mesh(spec, devices=jax.devices()[: spec.num_devices])


@cache
def numbers_of(config: ModelConfig) -> Any:
    """Parameters in numpy, drawn so large that logits differ clearly and attention is no mere mean."""
    rng = np.random.default_rng(1)
    shapes = param_shapes(config, mesh=mesh_of("data=1"))

    def draw(path: Any, leaf: Any) -> np.ndarray:
        is_scale, is_table = "scale" in str(path), "table" in str(path) or "positions" in str(path)
        size = 0.1 if is_scale else 1.0 if is_table else 1.5 / leaf.shape[-2] ** 0.5 if leaf.ndim > 1 else 0.1
        return (rng.standard_normal(leaf.shape) * size + is_scale).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def params_on(config: ModelConfig, mesh: Mesh, axes: MeshAxes = DEFAULT_AXES) -> Any:
    """The same parameters on a mesh, as a reader delivers them."""
    put = lambda leaf, shape: jax.device_put(leaf.astype(shape.dtype), shape.sharding)  # noqa: E731
    return jax.tree.map(put, numbers_of(config), param_shapes(config, mesh=mesh, axes=axes))


def engine_on(mesh: str, style: str = "llama", **sizes: Any) -> Engine:
    """An engine with a poisoned cache and small chunks."""
    config = model_of(style)
    own, axes = mesh_of(mesh), MeshSpec.parse(mesh).roles
    wanted: dict[str, Any] = {"slots": 8, "chunk": 4, "chunks_per_step": 4, "rounds": 3, "page": 2, "fill": "nan"}
    return Engine(config, params_on(config, own, axes), mesh=own, axes=axes, **(wanted | sizes))


@cache
def _full(config: ModelConfig) -> Any:
    whole = replace(config, expert_overflow="rounds")
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(whole, rngs=nnx.Rngs(0))))[0]
    return jax.jit(lambda params, tokens_BT: nnx.merge(graph, params)(tokens_BT))


def logits_of(config: ModelConfig, tokens_BT: np.ndarray, *, params: Any = None) -> np.ndarray:
    """All logits by the training path on one device, without any cache: [B, T, V]."""
    padded = np.zeros((len(tokens_BT), config.max_tokens), np.int32)
    padded[:, : tokens_BT.shape[1]] = tokens_BT
    return np.asarray(_full(config)(numbers_of(config) if params is None else params, padded))[:, : tokens_BT.shape[1]]


def settings_of(rows: int, **changes: Any) -> SamplingSettings:
    """The same settings for every row: greedy, without limits, but for what is named."""
    given: dict[str, Any] = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 0, "limit": 2**30}
    given |= {"repetition_penalty": 1, "frequency_penalty": 0, "presence_penalty": 0, "num_logprobs": -1}
    given["is_constrained"] = False
    given |= {"stops": [-1, -1], "bias_tokens": [-1, -1], "biases": [0, 0]} | changes
    whole = {"top_k", "limit", "num_logprobs", "stops", "bias_tokens"}

    def row(name: str, value: Any) -> np.ndarray:
        kinds = {"seed": np.uint32, "is_constrained": np.bool_}
        array = np.asarray(value, kinds.get(name, np.int32 if name in whole else np.float32))
        return np.broadcast_to(array, (rows, *array.shape))

    return SamplingSettings(**{name: row(name, value) for name, value in given.items()})


@jax.jit
def _choose(logits: jax.Array, settings: SamplingSettings, position: jax.Array) -> jax.Array:
    zeros, none = jnp.zeros(logits.shape, jnp.int32), jnp.zeros((1, 2), jnp.uint32)
    own: dict[str, Any] = {"read_seen": lambda: zeros, "read_allowed": lambda: none}
    return choose(logits, settings, position_B=position, axes=(), **own).token


def changed_logits(logits_V: np.ndarray, request: Request, answer: Sequence[int]) -> np.ndarray:
    """Biases and penalties as vLLM has them, token by token."""
    changed = logits_V.copy()
    for token, bias in request.logit_bias:
        changed[token] += np.float32(bias)
    penalty = np.float32(request.repetition_penalty)
    for token in {*request.prompt, *answer}:
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    for token, number in Counter(answer).items():
        changed[token] -= np.float32(request.frequency_penalty) * number + np.float32(request.presence_penalty)
    return changed


@cache
def answer_of(config: ModelConfig, request: Request) -> tuple[tuple[int, ...], str]:
    """What a request must get: every token by recomputing the whole sequence, with the same rule of settings."""
    tokens, new = list(request.prompt), []
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    settings = settings_of(1, **{name: getattr(request, name) for name in names})
    while len(new) < request.max_new_tokens:
        logits_1V = changed_logits(logits_of(config, np.asarray([tokens]))[0, -1], request, new)[None]
        token = int(_choose(logits_1V, settings, np.asarray([len(tokens)], np.int32))[0])
        if token in request.stop:
            return tuple(new), "stop"
        new.append(token)
        tokens.append(token)
    return tuple(new), "length"


def requests_of(kind: str, count: int = 10) -> list[Request]:
    """Requests of mixed lengths: prompts of 1 to 13 tokens, answers of 1 to 10."""
    rng = np.random.default_rng(3)
    found = []
    for index in range(count):
        how: dict[str, Any] = {}
        if kind == "sampled":
            how = {"temperature": 0.7 + 0.1 * (index % 4), "seed": index, "top_k": [0, 5, 0, 12][index % 4]}
            how["top_p"] = [1.0, 1.0, 0.8, 0.9][index % 4]
        if kind == "changed":
            # Greedy ones too: a tiny model repeats itself, so penalties change what follows.
            how = {"temperature": [0.0, 0.9][index % 2], "seed": index, "min_p": 0.1 * (index % 3)}
            how |= {"repetition_penalty": [1.0, 1.5, 0.7][index % 3], "frequency_penalty": 0.8 * (index % 2)}
            how |= {"presence_penalty": [1.2, 0.0, -0.5][index % 3], "logit_bias": [(7 * index % 64, 4.0), (3, -100)]}
            how["logprobs"] = [None, 0, 5][index % 3]
        prompt = tuple(rng.integers(0, 64, int(rng.integers(1, 14))).tolist())
        found.append(Request(prompt=prompt, max_new_tokens=int(rng.integers(1, 11)), **how))
    return found
