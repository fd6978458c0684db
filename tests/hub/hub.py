"""Small models of every architecture and their logits by trellax, for the tests of Hugging Face folders."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from trellax.configs import config_from_dict
from trellax.hub.config import read_hub_model
from trellax.hub.model_folder import load_params
from trellax.layers import ModelConfig, Transformer, model_rules
from trellax.meshes import MeshSpec, ShardingRules, build_mesh
from trellax.pipeline import pipeline_loss
from trellax.train import Setup
from trellax.train.checkpoints.initial_weights import weight_shapes
from trellax.train.checkpoints.layer_order import as_pipeline, params_in_stages

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"
VOCAB, T = 64, 24
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
_LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.25], "long_factor": [3.5]}
_YARN = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    | {"mscale": 1.0, "mscale_all_dim": 0.707, "beta_fast": 2.0}
}
_DENSE_THEN_EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
} | _DENSE_THEN_EXPERTS

MODELS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {"model_type": "llama", "num_key_value_heads": 2, "rope_parameters": _LLAMA3},
    "llama_dynamic": {"model_type": "llama", "num_key_value_heads": 2}
    | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "llama32": {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 8, "rope_parameters": _LLAMA3}
    | {"tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "dtype": "bfloat16"},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 5},
    "mixtral": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": 5},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 8, "norm_topk_prob": True}
    | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16},
    "deepseek_v2": {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy"} | _DEEPSEEK | _YARN,
    "deepseek_v2_lite": {"model_type": "deepseek_v2", "routed_scaling_factor": 1.5} | _DEEPSEEK | {"q_lora_rank": None},
    "deepseek_v3": {"model_type": "deepseek_v3", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
    | _DEEPSEEK
    | _YARN,
    "dots1": {"model_type": "dots1", "num_key_value_heads": 2, "norm_topk_prob": True} | _DENSE_THEN_EXPERTS,
    "glm4_moe": {"model_type": "glm4_moe", "num_key_value_heads": 2, "attention_bias": True, "use_qk_norm": True}
    | {"head_dim": 8, "rope_parameters": _YARN["rope_parameters"] | {"partial_rotary_factor": 0.5}}
    | _DENSE_THEN_EXPERTS,
    "gpt2": {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 64},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "olmo3": {"model_type": "olmo3", "num_key_value_heads": 2, "num_hidden_layers": 4, "sliding_window": 5}
    | {"pad_token_id": 0}
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "beta_fast": 2.0}
            | {"original_max_position_embeddings": 16},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    },
    "smollm3": {"model_type": "smollm3", "num_key_value_heads": 2, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}
    | {"num_hidden_layers": 3},
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, "sliding_window": 5, "pad_token_id": 0}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "phi4_mini": {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": True}
    | {"rope_parameters": _LONGROPE | {"partial_rotary_factor": 0.5}, "original_max_position_embeddings": 16},
    "phi3_short": {"model_type": "phi3", "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 256}
    | {"rope_parameters": _LONGROPE | {"long_factor": [3.0, 9.0], "short_factor": [1.0, 1.3]}}
    | {"original_max_position_embeddings": 128},
    "gemma2": {"model_type": "gemma2", "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 6}
    | {"num_hidden_layers": 3, "sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0},
    "gemma3": {"model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 12}
    | {"num_hidden_layers": 4, "sliding_window": 5, "sliding_window_pattern": 3}
    | {
        "rope_parameters": {"full_attention": _LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e2}}
    },
    "gpt_oss": {"model_type": "gpt_oss", "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 3}
    | {"num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 5, "dtype": "bfloat16"}
    | {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False, "beta_fast": 2.0}
        | {"original_max_position_embeddings": 16}
    },
    "granite": {"model_type": "granite", "num_key_value_heads": 2, "tie_word_embeddings": True}
    | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 3.0},
}
"""The keys that differ from `_SIZES` and from an architecture's own defaults."""

MESHES = ("data=1", "tensor=2", "tensor=4", "pipe=2", "tensor=2,pipe=2", "data=2,tensor=2")
EXPERT_MESHES = ("expert=2", "tensor=2,expert=2", "pipe=2,expert=2")
# With experts that files have one by one.
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "dots1", "glm4_moe")

CASES = [
    (name, mesh) for name in MODELS for mesh in (*MESHES, *(EXPERT_MESHES if name in (*EXPERTS, "gpt_oss") else ()))
]
"""Every model on every mesh that it fits."""


def hub_values_of(name: str) -> dict[str, Any]:
    """The keys of config.json that define a model of `MODELS`."""
    own = MODELS[name]
    return {"vocab_size": VOCAB} | own if own["model_type"] == "gpt2" else _SIZES | own


def tokens_of(*, batch: int = 2) -> np.ndarray:
    """Token ids [B, T], the same each time."""
    return np.random.default_rng(7).integers(0, VOCAB, (batch, T)).astype(np.int32)


def setup_of(config: ModelConfig, mesh: str) -> Setup:
    """A run of a model on the first devices, to read weights with; float32 whatever the files have."""
    spec = MeshSpec.parse(mesh)
    values = {
        "model": {**vars(config), "dtype": "float32"},
        "mesh": spec.sizes,
        "data": {"seq_len": T},
        "train": {"steps": 1, "batch_size": 2},
        "optimizer": {"learning_rate": 1e-3},
        # Two sequences: a microbatch has one on every device along data and expert.
        "pipeline": {"microbatches": max(spec.pipe // spec.data, 1)},
    }
    return Setup(config_from_dict(values), build_mesh(spec, devices=jax.devices()[: spec.num_devices]))


@cache
def _forward(config: ModelConfig, mesh: str) -> Any:
    setup = setup_of(config, mesh)
    rules = model_rules(config, setup.mesh.shape, rules=ShardingRules.of(MeshSpec.parse(mesh).roles))
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(setup.config.model, rngs=nnx.Rngs(0), rules=rules)))[0]
    return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))


def logits_of(folder: Path, mesh: str) -> np.ndarray:
    """Logits [B, T, V] of a folder's model, read onto a mesh without pipe."""
    setup = setup_of(read_hub_model(folder).config, mesh)
    params = load_params(folder, weight_shapes(setup))
    with jax.set_mesh(setup.mesh):
        return np.asarray(_forward(setup.config.model, mesh)(params, tokens_of()))


def token_losses_of(folder: Path, mesh: str) -> np.ndarray:
    """The pipeline's loss of each token alone, [B, T], where the target is the token itself."""
    setup = setup_of(read_hub_model(folder).config, mesh)
    params = params_in_stages(setup, as_pipeline(load_params(folder, weight_shapes(setup))))
    tokens = tokens_of().reshape(setup.config.pipeline.microbatches, -1, T)

    @jax.jit
    def loss(params: Any, weights: jax.Array) -> jax.Array:
        batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(tokens), "weights": weights}
        return pipeline_loss(setup.model.fns, params=params, batch=batch, mesh=setup.mesh, schedule=setup.schedule)

    alone = np.eye(tokens.size, dtype=np.float32).reshape(tokens.size, *tokens.shape)
    return np.array([float(loss(params, weights)) for weights in alone]).reshape(tokens_of().shape)


def losses_from(logits: np.ndarray) -> np.ndarray:
    """Cross-entropy of each token with itself as the target, [B, T], in float64."""
    logits = logits.astype(np.float64)
    normaliser = np.log(np.exp(logits).sum(-1))
    return normaliser - np.take_along_axis(logits, tokens_of()[..., None], axis=-1)[..., 0]


def wrong_by(folder: Path, mesh: str, logits: np.ndarray) -> float:
    """Largest difference of trellax's logits, or with pipe of every token's loss, from the true logits."""
    if "pipe" in mesh:
        return float(np.abs(token_losses_of(folder, mesh) - losses_from(logits)).max())
    return float(np.abs(logits_of(folder, mesh) - logits).max())


def shapes_of(folder: Path, mesh: str = "data=1") -> Any:
    """Shapes of a folder's parameters, as `read_weights` takes them."""
    return weight_shapes(setup_of(read_hub_model(folder).config, mesh))


def build_longer(name: str, folder: Path, *, num_tokens: int, monkeypatch: Any) -> np.ndarray:
    """Save a model with room for more positions, and return how transformers continues `tokens_of`: [B, new]."""
    import torch
    from transformers import AutoModelForCausalLM

    from . import make_hf_goldens

    room = "n_positions" if MODELS[name]["model_type"] == "gpt2" else "max_position_embeddings"
    monkeypatch.setitem(MODELS, name, MODELS[name] | {room: T + num_tokens})
    make_hf_goldens.save(name, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = torch.tensor(tokens_of(), dtype=torch.long)
    # Written out: generate() would stop at the end of a text.
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return tokens[:, T:].numpy()
