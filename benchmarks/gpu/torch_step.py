"""A worker of the GPU benchmark: the same training step in PyTorch, with torch.compile and fused attention.

float32 weights and AdamW, bfloat16 by autocast, gradients accumulated over microbatches. Arguments: shape, tokens per
sequence, number of steps to time. It prints one line of JSON and needs no package but torch.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from benchmarks.gpu.shapes import SHAPES, Shape


class Block(nn.Module):
    """Pre-norm attention with grouped queries and rotary positions, and SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, self.heads, self.kv_heads = shape.hidden_size, shape.num_heads, shape.num_kv_heads
        self.head = d // shape.num_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(d, eps=1e-5), nn.RMSNorm(d, eps=1e-5)
        self.qkv = nn.Linear(d, (self.heads + 2 * self.kv_heads) * self.head, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, 2 * shape.ffn_size, bias=False)
        self.down = nn.Linear(shape.ffn_size, d, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        sizes = [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]
        q, k, v = (
            part.view(b, t, -1, self.head) for part in self.qkv(normalize(self.attention_norm, x)).split(sizes, dim=-1)
        )
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        gate, up = self.up(normalize(self.mlp_norm, x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Model(nn.Module):
    """Tokens and targets to the mean loss."""

    def __init__(self, shape: Shape, seq_len: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=1e-5)
        self.head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        head = shape.hidden_size // shape.num_heads
        angle = torch.arange(seq_len)[:, None] * 10_000.0 ** (-torch.arange(0, head, 2) / head)
        self.register_buffer("cos", angle.cos()[:, None])
        self.register_buffer("sin", angle.sin()[:, None])
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # The residual stream in bfloat16, as trellax has it; float32 would move twice the bytes.
        x = self.embed(tokens).to(torch.bfloat16)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return functional.cross_entropy(self.head(normalize(self.norm, x)).flatten(0, 1).float(), targets.flatten())


def normalize(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalize with statistics in float32, as autocast does, and return the result in the dtype of x."""
    return norm(x).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary positions to queries or keys, [b, t, heads, head]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def run_step(
    model: Model, loss_of: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, tokens: torch.Tensor
) -> torch.Tensor:
    """Accumulate gradients over the microbatches of tokens [m, b, t + 1], update, and return the mean loss."""
    total = torch.zeros((), device=tokens.device)
    for microbatch in tokens:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = loss_of(microbatch[:, :-1], microbatch[:, 1:]) / len(tokens)
        loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def main() -> None:
    name, seq_len, num_steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    shape, device = SHAPES[name], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Model(shape, seq_len).to(device)
    loss_of: Callable[..., torch.Tensor] = torch.compile(model) if device == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    num_microbatches = shape.tokens // shape.microbatch_tokens
    tokens = torch.randint(shape.vocab_size, (num_microbatches, shape.microbatch_tokens // seq_len, seq_len + 1))
    tokens = tokens.to(device)

    step = partial(run_step, model, loss_of, optimizer, tokens)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    start_s = time.perf_counter()
    for _ in range(3):
        loss = step()
    wait()
    warm_s, times_s = time.perf_counter() - start_s, []
    for _ in range(num_steps):
        start_s = time.perf_counter()
        step()
        wait()
        times_s.append(time.perf_counter() - start_s)
    peak_bytes = torch.cuda.max_memory_allocated() if device == "cuda" else None
    answer = {
        "torch": torch.__version__,
        "warm_up_s": warm_s,
        "loss_after_3": float(loss),
        "step_s": statistics.median(times_s),
        "step_min_s": min(times_s),
        "peak_bytes": peak_bytes,
    }
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
