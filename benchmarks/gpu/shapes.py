"""Sizes of the models that the GPU benchmark measures, as plain numbers that the torch worker reads too."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama: RMSNorm, rotary positions, SwiGLU, grouped queries, no biases, untied output.

    A step processes `tokens` tokens in microbatches of `microbatch_tokens`.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    tokens: int
    microbatch_tokens: int

    @property
    def num_params(self) -> int:
        """Number of parameters without those of norms."""
        d, kv = self.hidden_size, self.hidden_size * self.num_kv_heads // self.num_heads
        return 2 * self.vocab_size * d + self.num_layers * (2 * d * d + 2 * d * kv + 3 * d * self.ffn_size)


SHAPES: dict[str, Shape] = {
    "125m": Shape(
        vocab_size=32768,
        num_layers=12,
        hidden_size=768,
        num_heads=12,
        num_kv_heads=12,
        ffn_size=2048,
        tokens=131_072,
        microbatch_tokens=32_768,
    ),
    "1b": Shape(
        vocab_size=32768,
        num_layers=16,
        hidden_size=2048,
        num_heads=16,
        num_kv_heads=8,
        ffn_size=8192,
        tokens=65_536,
        microbatch_tokens=16_384,
    ),
    "3b": Shape(
        vocab_size=32768,
        num_layers=28,
        hidden_size=3072,
        num_heads=24,
        num_kv_heads=8,
        ffn_size=8192,
        tokens=32_768,
        microbatch_tokens=8_192,
    ),
    "8b": Shape(
        vocab_size=128_256,
        num_layers=4,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        ffn_size=14_336,
        tokens=32_768,
        microbatch_tokens=8_192,
    ),
    "tiny": Shape(
        vocab_size=512,
        num_layers=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=192,
        tokens=1024,
        microbatch_tokens=512,
    ),
}
