"""A worker for a transformer with a large vocabulary, which is on the end stages or split over all ranks.

Hidden 256, 8 layers, 4 heads, sequence 128, microbatch 4, vocabulary 8192, untied, float32, no remat; loss and
gradients by 1F1B. `run.py` starts it with the number of devices, all of which are pipeline ranks.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from trellax.layers import ModelConfig, model_rules
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import PipelinedModel, PipelineParams, lower, pipeline_grads, split_transformer
from trellax.programs.hlo import HloModule
from trellax.schedules import Schedule, Vocab, build_schedule, simulate

from benchmarks.workers.process import serve, start_devices
from benchmarks.workers.scopes import count_in_loop, time_scopes
from benchmarks.workers.traces import count_traced, instructions_of
from benchmarks.workers.train_step import make_batch

CONFIG = ModelConfig(
    vocab_size=8192, num_layers=8, hidden_size=256, num_heads=4, max_tokens=128, embeddings="untied", dtype="float32"
)
NUM_SEQUENCES = 4
"""In each microbatch."""


@dataclass(frozen=True, kw_only=True)
class VocabBench:
    """The same transformer cut both ways, and its compiled programs."""

    mesh: jax.sharding.Mesh
    models: dict[Vocab, PipelinedModel]
    params: dict[Vocab, PipelineParams]
    compiled: dict[tuple[str, Vocab, int], Any] = field(default_factory=dict)

    def memory(self, vocab: Vocab, num_microbatches: int) -> dict[str, Any]:
        """Return bytes of parameters and temporaries on each device, and slots and microbatches in flight of 1F1B."""
        schedule = self._schedule("1f1b", vocab, num_microbatches)
        tables = lower(schedule, ends="together" if vocab == "split" else "alone")
        leaves = jax.tree.leaves(self.models[vocab].params)
        analysis = self._compile("1f1b", vocab, num_microbatches).memory_analysis()
        return {
            "param_bytes": sum(math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize for p in leaves),
            "temp_bytes": analysis.temp_size_in_bytes,
            "activation_slots": tables.num_activation_slots,
            "gradient_slots": tables.num_gradient_slots,
            "save_slots": tables.num_residual_slots,
            "peak_in_flight": list(simulate(schedule).peak_in_flight),
        }

    def step(self, vocab: Vocab, num_microbatches: int) -> dict[str, float]:
        """Run one step of 1F1B; return its wall and CPU seconds. Call it once before, to compile and warm up."""
        compiled = self._compile("1f1b", vocab, num_microbatches)
        inputs = self.params[vocab], self._batch(num_microbatches)
        start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(*inputs))
        return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}

    def actions(self, num_microbatches: int, rounds: int) -> dict[str, Any]:
        """Return seconds by scope and rank with the vocabulary on the ends, one rank acting at a time."""
        compiled = self._compile("naive", "ends", num_microbatches)
        inputs = self.params["ends"], self._batch(num_microbatches)
        jax.block_until_ready(compiled(*inputs))
        return time_scopes({"naive": (compiled, inputs)}, rounds=rounds)["naive"]

    def all_reduces(self, vocab: Vocab, num_microbatches: int) -> dict[str, float]:
        """Return the all-reduces that a device runs: in the loop over turns for a microbatch, and once a step."""
        compiled = self._compile("1f1b", vocab, num_microbatches)
        counts = count_traced(lambda: compiled(self.params[vocab], self._batch(num_microbatches)))
        program = HloModule.parse(compiled.as_text())
        names = [i.name for i in instructions_of(program, "all-reduce")]
        in_loop = count_in_loop(program, counts, "all-reduce")
        once = sum(counts[name] for name in names) - in_loop
        return {"a_microbatch": in_loop / self.mesh.size / num_microbatches, "once_a_step": once / self.mesh.size}

    def _schedule(self, name: str, vocab: Vocab, num_microbatches: int) -> Schedule:
        return build_schedule(name, num_ranks=self.mesh.size, num_microbatches=num_microbatches, vocab=vocab)

    def _batch(self, num_microbatches: int) -> dict[str, np.ndarray]:
        return make_batch(CONFIG, num_microbatches, NUM_SEQUENCES)

    def _compile(self, name: str, vocab: Vocab, num_microbatches: int) -> Any:
        key = name, vocab, num_microbatches
        if key not in self.compiled:
            fns, schedule = self.models[vocab].fns, self._schedule(*key)

            def step(params: PipelineParams, batch: Any) -> Any:
                return pipeline_grads(fns, params=params, batch=batch, mesh=self.mesh, schedule=schedule)

            lowered = jax.jit(step).lower(self.params[vocab], self._batch(num_microbatches))
            self.compiled[key] = lowered.compile()
        return self.compiled[key]


def _open(num_devices: int) -> dict[str, Callable[..., Any]]:
    mesh = build_mesh(MeshSpec(pipe=num_devices))
    rules = model_rules(CONFIG, mesh.shape)
    vocabs: tuple[Vocab, ...] = ("ends", "split")
    models = {vocab: split_transformer(CONFIG, mesh=mesh, rules=rules, vocab=vocab) for vocab in vocabs}
    bench = VocabBench(mesh=mesh, models=models, params={vocab: model.init(0) for vocab, model in models.items()})
    return {"memory": bench.memory, "step": bench.step, "actions": bench.actions, "all_reduces": bench.all_reduces}


if __name__ == "__main__":
    start_devices(int(sys.argv[1]))
    serve(_open(int(sys.argv[1])))
