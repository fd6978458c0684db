"""config.json is read as a model and written back; everything that trellax cannot compute is listed at once."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trellax.hub.config import hub_model, model_differences, read_hub_model
from trellax.hub.config_write import hub_values
from trellax.layers import ModelConfig, param_counts
from trellax.layers.rope.magnitude import rope_magnitude
from trellax.meshes import WeightsError

from .hub import GOLDEN, MODELS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
OLD_LLAMA3 = {
    "rope_theta": 500_000.0,
    "rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
}

QWEN3_WINDOW = {"model_type": "qwen3", "num_key_value_heads": 2, "sliding_window": 8, "use_sliding_window": True}

MIXTRAL: dict[str, Any] = LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2}
QWEN3_MOE: dict[str, Any] = LLAMA | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts": 8}

DEEPSEEK: dict[str, Any] = LLAMA | {"model_type": "deepseek_v3", "first_k_dense_replace": 1, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "num_key_value_heads": 4, "num_experts_per_tok": 2}

MISTAKES: dict[str, dict[str, Any]] = {
    "deepseek_v2": DEEPSEEK
    | {"model_type": "deepseek_v2", "topk_method": "noaux_tc", "norm_topk_prob": True, "scoring_func": "sigmoid"}
    | {"moe_layer_freq": 2, "n_shared_experts": None, "q_lora_rank": 0, "mlp_bias": True},
    "deepseek_v3": DEEPSEEK
    | {"topk_method": "greedy", "norm_topk_prob": 1, "rope_interleave": False, "attention_bias": True}
    | {"kv_lora_rank": "512", "n_group": -1, "rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
    "deepseek_v3_of_dense_layers": DEEPSEEK | {"first_k_dense_replace": 2},
    "deepseek_v3_without_rotated_features": DEEPSEEK | {"qk_rope_head_dim": 3},
    "deepseek_v32": DEEPSEEK | {"model_type": "deepseek_v32"},
    "dots1": DEEPSEEK | {"model_type": "dots1", "n_shared_experts": 0, "sliding_window": 8, "max_window_layers": 1},
    "glm4_moe": DEEPSEEK
    | {"model_type": "glm4_moe", "partial_rotary_factor": 1.5, "use_qk_norm": "yes", "scoring_func": "softmax"},
    "olmo2": LLAMA | {"model_type": "olmo2", "attention_bias": True, "rms_norm_eps": 0},
    "granite": LLAMA | {"model_type": "granite", "mlp_bias": True, "logits_scaling": 0, "residual_multiplier": "0.2"},
    "smollm3": LLAMA
    | {"model_type": "smollm3", "no_rope_layers": [1, 2], "use_sliding_window": True}
    | {"sliding_window": 8},
    "smollm3_of_few_layers": LLAMA | {"model_type": "smollm3", "no_rope_layers": [1]},
    "smollm3_with_windows": LLAMA | {"model_type": "smollm3", "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": LLAMA | {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0, -1.0]}},
    "phi3_yarn": LLAMA | {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "phi3_of_few_factors": LLAMA
    | {"model_type": "phi3", "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
    "phi3_linear": LLAMA | {"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "gemma2": LLAMA
    | {"model_type": "gemma2", "hidden_activation": "gelu", "attention_bias": True, "sliding_window": None}
    | {"final_logit_softcapping": -1, "query_pre_attn_scalar": 0, "layer_types": ["full_attention", "chunked"]},
    "gemma2_of_few_layers": LLAMA | {"model_type": "gemma2", "layer_types": ["full_attention"]},
    "gemma3_text": LLAMA
    | {"model_type": "gemma3_text", "use_bidirectional_attention": True, "sliding_window_pattern": 0}
    | {"rope_parameters": {"rope_type": "linear", "sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
    "gemma3": LLAMA | {"model_type": "gemma3"},
    "gpt_oss": LLAMA
    | {
        "model_type": "gpt_oss",
        "attention_bias": False,
        "swiglu_limit": 10.0,
        "layer_types": ["full_attention", "chunked"],
    }
    | {"quantization_config": {"quant_method": "fp8"}, "sliding_window": 0},
    "gpt_oss_of_few_layers": LLAMA | {"model_type": "gpt_oss", "layer_types": ["full_attention"]},
    "olmo3": LLAMA
    | {"model_type": "olmo3", "attention_bias": True, "layer_types": ["chunked"], "rope_theta": 77.0}
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
            "sliding_attention": {"rope_type": "yarn", "rope_theta": -1.0},
            "chunked_attention": {},
        }
    },
    "llama_in_mxfp4": LLAMA | {"quantization_config": {"quant_method": "mxfp4"}},
    "yarn": LLAMA
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": "no", "beta_fast": -1, "mscale": "1"}},
    "yarn_of_few_turns": LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0.5}},
    "qwen2_moe": LLAMA | {"model_type": "qwen2_moe"},
    "mixtral": MIXTRAL | {"num_local_experts": 0, "num_experts_per_tok": "2", "router_jitter_noise": 0.1},
    "mixtral_of_few_experts": MIXTRAL | {"num_local_experts": 2, "num_experts_per_tok": 3},
    "qwen3_moe": QWEN3_MOE
    | {"decoder_sparse_step": 2, "mlp_only_layers": [0], "norm_topk_prob": 1}
    | {"attention_bias": True, "moe_intermediate_size": 0},
    "architecture": {"model_type": "olmoe"},
    "architecture_misspelt": LLAMA | {"model_type": "lama"},
    "no_architecture": {},
    "rope_type": LLAMA | {"rope_scaling": {"rope_type": "su", "factor": 4.0}},
    "quantised": LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "everything_at_once": {"model_type": "llama", "hidden_act": "gelu", "attention_bias": True, "hidden_size": "16"}
    | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "quantization_config": {"bits": 4}},
    "windows_that_differ": LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1},
    "sizes_that_contradict": LLAMA | {"num_key_value_heads": 3},
    "rope_of_a_list": LLAMA | {"rope_scaling": ["llama3"]},
    "rope_theta_of_words": LLAMA | {"rope_theta": "large"},
    "rope_theta_too_large": LLAMA | {"rope_theta": 10**400},
    "layer_types_of_no_list": LLAMA | {"model_type": "qwen2", "use_sliding_window": True, "layer_types": {"a": 1}},
    "architecture_of_a_list": {"model_type": ["llama"]},
    "gpt2": GPT2 | {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_unsupported_settings_are_listed(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(WeightsError) as caught:
        hub_model(MISTAKES[name])
    golden(f"errors/hub/hub_{name}.txt", str(caught.value))


BROKEN = {"broken_json": '{"model_type": "llama",\n  "vocab_size" 64}', "no_object": "[1, 2]", "missing": None}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_reported_with_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    if (text := BROKEN[name]) is not None:
        Path("model/config.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        read_hub_model("model")
    golden(f"errors/hub/hub_{name}.txt", str(caught.value))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"vocab_size": ' + "9" * 5_000 + "}"], ids=["deep", "long number"])
def test_file_that_python_does_not_read_is_reported(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json cannot be read"):
        read_hub_model(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_model_is_the_same_after_a_round_trip(name: str) -> None:
    model = read_hub_model(GOLDEN / name)
    again = hub_model(hub_values(model.config, architecture=model.architecture))
    assert (again.config, again.architecture) == (model.config, model.architecture)


def test_scaled_positions_of_transformers_4_are_read() -> None:
    config = hub_model(LLAMA | OLD_LLAMA3).config
    assert (config.rope_theta, config.rope_scaling, config.rope_factor) == (500_000.0, "llama3", 8.0)
    assert config.rope_original_tokens == 8192


def test_llama_2_leaves_out_what_it_need_not_say() -> None:
    config = hub_model(LLAMA | {"torch_dtype": "float16"}).config
    assert (config.num_kv_heads, config.rope_theta, config.embeddings, config.dtype) == (4, 1e4, "untied", "float32")


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 4096, "num_key_value_heads": 2}, 4096),
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2}, 0),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 4096, "use_sliding_window": False}, 0),
        (QWEN3_WINDOW | {"max_window_layers": 0}, 8),
        (QWEN3_WINDOW | {"max_window_layers": 2}, 0),
        (MIXTRAL, 0),
        (MIXTRAL | {"sliding_window": 8}, 8),
        (QWEN3_MOE | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, 8),
        (QWEN3_MOE | {"sliding_window": 8}, 0),
    ],
)
def test_window_is_what_every_layer_has(values: dict[str, Any], window: int) -> None:
    assert hub_model(LLAMA | values).config.attention_window == window


def test_experts_that_a_file_leaves_out_are_those_of_transformers() -> None:
    config = hub_model(MIXTRAL).config
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (8, 2, 32)
    assert (config.router_normalize, config.rope_theta) == ("on", 1e6)
    config = hub_model({key: value for key, value in QWEN3_MOE.items() if key != "num_experts"}).config
    assert (config.num_experts, config.experts_per_token, config.expert_size) == (128, 8, 768)
    assert (config.router_normalize, config.rope_theta) == ("off", 1e4)


def test_layers_that_a_file_leaves_out_are_those_of_transformers() -> None:
    own = LLAMA | {"num_hidden_layers": 4, "num_key_value_heads": 4}
    config = hub_model(own | {"model_type": "deepseek_v3"}).config
    assert (config.head_size, config.rope_head_size, config.value_head_size) == (192, 64, 128)
    assert (config.latent_size, config.query_latent_size) == (512, 1536)
    assert (config.dense_layers, config.num_experts, config.experts_per_token, config.shared_size) == (3, 256, 8, 2048)
    assert (config.router_groups, config.router_groups_kept, config.router_scale) == (8, 4, 2.5)
    config = hub_model(
        own | {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3}
    ).config
    assert (config.dense_layers, config.shared_size, config.router_normalize) == (0, 2 * 1407, "off")
    # Only topk_method="group_limited_greedy" looks at groups.
    assert (config.router, config.router_bias, config.router_groups) == ("softmax", "off", 1)
    config = hub_model(own | {"model_type": "glm4_moe", "head_dim": 8}).config
    assert (config.dense_layers, config.rope_head_size, config.bias, config.norm_epsilon) == (1, 4, "off", 1e-5)


V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 129_280,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
}
V3 |= {"num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128}
LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "vocab_size": 102_400,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
}
LITE |= {"num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "moe_intermediate_size": 1408}
LITE |= {"num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 151_552,
    "hidden_size": 5120,
    "intermediate_size": 12_288,
}
GLM |= {"num_hidden_layers": 92, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128}
GLM |= {"moe_intermediate_size": 1536, "n_routed_experts": 160, "first_k_dense_replace": 3, "attention_bias": True}
GLM |= {"use_qk_norm": True}


@pytest.mark.parametrize(
    ("values", "expected"),
    [(V3, 671_026_419_200), (LITE, 15_706_484_224), (GLM, 352_797_829_024)],
    ids=["v3", "v2", "glm"],
)
def test_published_models_have_as_many_parameters_as_in_transformers(values: dict[str, Any], expected: int) -> None:
    assert param_counts(hub_model(values).config).total == expected


def test_yarn_is_scaled_as_the_file_says() -> None:
    def read(**values: Any) -> ModelConfig:
        scaling = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, **values}
        return hub_model(LLAMA | {"rope_scaling": scaling}).config

    config = read()
    assert (config.rope_scaling, config.rope_factor, config.rope_original_tokens) == ("yarn", 40.0, 4096)
    assert (config.rope_low_frequency_factor, config.rope_high_frequency_factor) == (1.0, 32.0)
    assert (config.rope_attention_factor, rope_magnitude(config)) == (0.0, 0.1 * math.log(40) + 1)
    # DeepSeek-V3's: rotated features are as long as ever, and scores are scaled instead.
    config = read(mscale=1.0, mscale_all_dim=1.0)
    assert (config.rope_attention_factor, config.rope_mscale_all) == (1.0, 1.0)
    written = hub_values(config, architecture="llama")["rope_parameters"]
    assert (written["mscale"], written["mscale_all_dim"], written["attention_factor"]) == (1.0, 1.0, 1.0)
    assert read(attention_factor=1.5, mscale=0.7, mscale_all_dim=1.0).rope_attention_factor == 1.5


def test_biases_on_all_linear_layers_of_a_llama() -> None:
    assert hub_model(LLAMA | {"attention_bias": True, "mlp_bias": True}).config.bias == "on"


EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2}
SHARED: dict[str, Any] = EXPERTS | {"expert_size": 8, "shared_size": 16}
LATENTS: dict[str, Any] = {"latent_size": 8, "head_size": 12, "rope_head_size": 4}
BIASED: dict[str, Any] = {"router": "sigmoid", "router_bias": "on"}


def model(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "hidden_size": 16, "num_heads": 4}
    values |= {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rotary", "bias": "off", "embeddings": "untied"}
    return ModelConfig(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({"bias": "qkv"}, "qwen2"),
        ({"qk_norm": "on"}, "qwen3"),
        ({"attention_window": 8}, "mistral"),
        ({"bias": "on"}, "llama"),
        (EXPERTS, "mixtral"),
        (EXPERTS | {"qk_norm": "on", "router_normalize": "off"}, "qwen3_moe"),
        (LATENTS | SHARED | {"router_normalize": "off"}, "deepseek_v2"),
        (LATENTS | SHARED | BIASED | {"dense_layers": 1}, "deepseek_v3"),
        (SHARED | BIASED | {"bias": "qkv", "rope_head_size": 2}, "glm4_moe"),
        ({"mlp": "gelu", "norm": "layernorm", "positions": "learned", "bias": "on"}, "gpt2"),
    ],
)
def test_architecture_follows_from_what_a_model_has(changes: dict[str, Any], architecture: str) -> None:
    assert hub_values(model(**changes))["model_type"] == architecture


REFUSED: dict[str, tuple[dict[str, Any], str | None]] = {
    "ambiguous": ({}, None),
    "none_fits": ({"mlp": "gelu"}, None),
    "other_fits": ({"qk_norm": "on", "attention_window": 4}, "llama"),
    "unknown": ({}, "mistrall"),
    "without_experts": (EXPERTS, "llama"),
    "with_experts": ({}, "mixtral"),
    "other_experts": (
        EXPERTS
        | {"shared_size": 8, "router": "sigmoid", "router_scale": 2.5, "router_groups": 2}
        | {"router_normalize": "off"},
        "mixtral",
    ),
    "latents": (LATENTS | {"rope_scaling": "linear", "rope_factor": 2.0}, "llama"),
    "other_shared_experts": (LATENTS | SHARED | {"shared_size": 12, "attention_window": 4}, "deepseek_v3"),
    "no_latents": (SHARED | {"qk_norm": "on"}, "deepseek_v2"),
    "rotated_parts": (SHARED | BIASED | {"qk_norm": "on", "rope_head_size": 2}, "dots1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architecture_that_does_not_hold_the_model_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    changes, architecture = REFUSED[name]
    with pytest.raises(WeightsError) as caught:
        hub_values(model(**changes), architecture=architecture)
    golden(f"errors/hub/hub_architecture_{name}.txt", str(caught.value))


def test_values_are_plain_json() -> None:
    values = hub_values(model(), architecture="llama")
    assert json.loads(json.dumps(values)) == values


def test_compute_dtype_does_not_change_the_model_and_learned_positions_do() -> None:
    assert model_differences(model(), model(dtype="bfloat16", max_tokens=7)) == []
    assert model_differences(model(rope_theta=5.0), model()) == ["rope_theta"]
    trained = {"balance_loss": 0.1, "router_z_loss": 0.1, "expert_capacity": 2.0, "expert_overflow": "drop"}
    assert (
        model_differences(model(**EXPERTS, expert_size=9, **trained), model(**EXPERTS, expert_size=9, ffn_size=7)) == []
    )
    assert model_differences(model(**EXPERTS, router_scale=2.0), model(**EXPERTS)) == ["router_scale"]
    learned = {"positions": "learned"}
    assert model_differences(model(**learned, max_tokens=7), model(**learned)) == ["max_tokens"]
