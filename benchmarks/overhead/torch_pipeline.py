"""A worker that runs the same training step in PyTorch: `torch.distributed.pipelining`, 1F1B, four processes over gloo.

It has the shapes of `../workers/train_step.py`: hidden 256, 8 layers, 4 heads, sequence 128, microbatch 4, vocabulary
1024, float32, AdamW; two layers per stage, the embedding on the first stage and the head on the last. Each stage is a
process with one thread, on two cores. `run.py` starts it with the number of stages; the first process answers.
"""

import os
import socket
import subprocess
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional

from benchmarks.workers.process import serve

HIDDEN, LAYERS, HEADS, TOKENS, VOCAB, NUM_SEQUENCES = 256, 8, 4, 128, 1024, 4


class Block(nn.Module):
    """Pre-norm attention and GELU MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        heads = (part.view(b, t, HEADS, -1).transpose(1, 2) for part in self.qkv(self.attention_norm(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(functional.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


class Stage(nn.Module):
    """The layers of one rank, with the end of the model that it has."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN) if rank == 0 else None
        self.positions = nn.Embedding(TOKENS, HIDDEN) if rank == 0 else None
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS // num_ranks)))
        is_last = rank == num_ranks - 1
        self.head = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)) if is_last else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embed is not None and self.positions is not None:
            x = self.embed(x) + self.positions.weight[None, : x.shape[1]]
        x = self.blocks(x)
        return x if self.head is None else self.head(x)


class Rank:
    """One process: its stage, its optimizer, and a schedule for each number of microbatches."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        torch.manual_seed(rank)
        torch.set_num_threads(1)
        self.rank, self.num_ranks, self.module = rank, num_ranks, Stage(rank, num_ranks)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.schedules: dict[int, Schedule1F1B] = {}

    def step(self, num_microbatches: int) -> dict[str, float]:
        """Run one step on all ranks; the first call of a number warms up."""
        if num_microbatches not in self.schedules:
            stage = PipelineStage(self.module, self.rank, self.num_ranks, torch.device("cpu"))
            self.schedules[num_microbatches] = Schedule1F1B(stage, num_microbatches, loss_fn=_loss)
            self._run(num_microbatches)
        dist.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        self._run(num_microbatches)
        cpu_s = torch.tensor(time.process_time() - cpu_start)
        dist.barrier()
        wall_s = time.perf_counter() - start
        dist.all_reduce(cpu_s)
        return {"wall_s": wall_s, "cpu_s": float(cpu_s)}

    def _run(self, num_microbatches: int) -> None:
        tokens = torch.zeros(num_microbatches * NUM_SEQUENCES, TOKENS, dtype=torch.long)
        first = (tokens,) if self.rank == 0 else ()
        last: dict[str, Any] = {"target": tokens} if self.rank == self.num_ranks - 1 else {}
        self.schedules[num_microbatches].step(*first, **last)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    num_ranks, rank = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    warnings.simplefilter("ignore")
    others = []
    if rank == 0:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        command = [sys.executable, "-m", "benchmarks.overhead.torch_pipeline", str(num_ranks)]
        others = [subprocess.Popen([*command, str(r)], stdin=subprocess.PIPE) for r in range(1, num_ranks)]
    dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
    own = Rank(rank, num_ranks)

    def step(num_microbatches: int) -> dict[str, float]:
        for other in others:
            assert other.stdin is not None
            other.stdin.write(f"{num_microbatches}\n".encode())
            other.stdin.flush()
        return own.step(num_microbatches)

    if rank == 0:
        serve({"step": step})
    else:
        # Ends with the pipe of the first process, whichever way that ends.
        for line in sys.stdin:
            own.step(int(line))


if __name__ == "__main__":
    main()
