"""Models and layouts that several tests of the planner share."""

from typing import Any

from trellax.layers import ModelConfig

_LLAMA: dict[str, Any] = {
    "vocab_size": 128256,
    "mlp": "swiglu",
    "norm": "rmsnorm",
    "positions": "rotary",
    "bias": "off",
    "embeddings": "untied",
    "dtype": "bfloat16",
    "max_tokens": 8192,
}

LLAMA_8B = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, ffn_size=14336, **_LLAMA)
LLAMA_70B = ModelConfig(num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, ffn_size=28672, **_LLAMA)
LLAMA_405B = ModelConfig(num_layers=126, hidden_size=16384, num_heads=128, num_kv_heads=8, ffn_size=53248, **_LLAMA)
GPT2 = ModelConfig(vocab_size=50304, num_layers=12, hidden_size=768, num_heads=12, max_tokens=1024)
_EXPERTS: dict[str, Any] = {"num_experts": 128, "experts_per_token": 8, "expert_size": 768}
QWEN3_30B = ModelConfig(
    num_layers=48, hidden_size=2048, num_heads=32, num_kv_heads=4, head_size=128, **(_LLAMA | _EXPERTS)
)
