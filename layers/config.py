"""The sizes and choices that define a model; everything else about it is derived.

Counts that follow from a `ModelConfig` are in `counts.py`. Read `transformer.py` next.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ..meshes import ModelError, suggest


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: GPT-2 and Llama shapes and what lies between.

    `num_kv_heads`, `head_size` and `ffn_size` may be left out: they become `num_heads` (multi-head attention),
    `hidden_size / num_heads`, and 4 x hidden (GELU) or 8/3 x hidden rounded up to 64 (SwiGLU).

    Raises:
        ModelError: a value of the wrong type or none of the choices, sizes that are not positive, or that do not
            divide each other, each with the equation.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int = 0
    head_size: int = 0
    ffn_size: int = 0
    max_tokens: int = 2048
    mlp: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: float = 1e-5
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0
    bias: Literal["on", "off"] = "on"
    embeddings: Literal["tied", "untied"] = "tied"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), field.type)
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "max_tokens"):
            if getattr(self, name) < 1:
                raise ModelError(
                    f"{name}={getattr(self, name)}: a model needs at least 1.", fix=f"set {name}=1 or more."
                )
        for name in ("num_kv_heads", "head_size", "ffn_size"):
            if getattr(self, name) < 0:
                raise ModelError(
                    f"{name}={getattr(self, name)} is negative.", fix=f"leave {name} out (0) to have it derived."
                )
        for name in ("norm_epsilon", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ModelError(f"{name}={getattr(self, name)} must be above 0.", fix=f"leave {name} out.")
        self._derive()
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}: every key/value head "
                "serves the same number of query heads.",
                fix=f"set num_kv_heads to a divisor of {self.num_heads}.",
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise ModelError(
                f"head_size={self.head_size} is odd, and rotary positions turn pairs of features.",
                fix=f"set head_size={self.head_size + 1}, or positions='learned'.",
            )

    def _derive(self) -> None:
        if not self.head_size:
            if self.hidden_size % self.num_heads:
                raise ModelError(
                    f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}: "
                    f"{self.hidden_size} / {self.num_heads} = {self.hidden_size / self.num_heads:.2f}.",
                    fix="choose num_heads that divides hidden_size, or give head_size.",
                )
            object.__setattr__(self, "head_size", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.ffn_size:
            wide = 4 * self.hidden_size
            thin = -(-8 * self.hidden_size // 3 // 64) * 64
            object.__setattr__(self, "ffn_size", wide if self.mlp == "gelu" else thin)

    @property
    def query_size(self) -> int:
        """Width of all query heads together, num_heads x head_size."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together, num_kv_heads x head_size."""
        return self.num_kv_heads * self.head_size


def _check_type(name: str, value: Any, kind: Any) -> None:
    if choices := get_args(kind):
        if value not in choices:
            hint = suggest(str(value), choices)
            raise ModelError(f"{name}={value!r} is no choice.{hint}", fix=f"use {' or '.join(map(repr, choices))}.")
    elif isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        what = "whole number" if kind is int else "number"
        raise ModelError(f"{name}={value!r} is not a {what}.", fix=f"give a {what}, without quotes.")
