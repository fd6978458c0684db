"""A worker that compiles and runs a whole training step of a small transformer: loss, gradients and AdamW.

Hidden 256, 8 layers, 4 heads, sequence 128, microbatch 4, vocabulary 1024, float32, GELU MLP of 4 x hidden. The
pipeline and overhead benchmarks start it with the number of devices, all of which are pipeline ranks.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import optax
from trellax.layers import ModelConfig, model_rules
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import PipelinedModel, pipeline_grads, split_transformer
from trellax.programs.hlo import HloModule
from trellax.schedules import build_schedule

from benchmarks.workers.process import serve, start_devices
from benchmarks.workers.work_r1 import are_same_bits

CONFIG = ModelConfig(vocab_size=1024, num_layers=8, hidden_size=256, num_heads=4, max_tokens=128)
NUM_SEQUENCES = 4
"""In each microbatch."""


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """Model, state and compiled steps of this process; all steps update the same state."""

    model: PipelinedModel
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    state: dict[str, Any]
    steps: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def compile(self, schedule: str, num_microbatches: int) -> dict[str, float]:
        """Compile a step without a cache; return seconds, instructions and temporary bytes per device."""
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled = self._compile(schedule, make_batch(CONFIG, num_microbatches, NUM_SEQUENCES))
        wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        return {
            "wall_s": wall_s,
            "cpu_s": cpu_s,
            "instructions": HloModule.parse(compiled.as_text()).num_instructions,
            "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        }

    def step(self, num_microbatches: int, num_sequences: int) -> dict[str, float]:
        """Run one step (the first call compiles it and warms it up); return its wall and CPU seconds."""
        key = f"{num_microbatches} x {num_sequences}"
        if key not in self.steps:
            batch = make_batch(CONFIG, num_microbatches, num_sequences)
            self.steps[key] = self._compile("1f1b", batch), batch
            self._run(key)
        start, cpu_start = time.perf_counter(), time.process_time()
        self._run(key)
        return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}

    def bubbles(self, schedule: str, num_microbatches: int) -> bool:
        """Return whether loss and gradients are the same to the bit when bubbles are filled with NaN."""
        batch = make_batch(CONFIG, num_microbatches, NUM_SEQUENCES)
        grid = build_schedule(schedule, num_ranks=self.mesh.shape["pipe"], num_microbatches=num_microbatches)

        def grads(fill: Any) -> Any:
            return jax.jit(
                lambda params: pipeline_grads(
                    self.model.fns, params=params, batch=batch, mesh=self.mesh, schedule=grid, bubbles=fill
                )
            )(self.state["params"])

        return are_same_bits(grads("zeros"), grads("nan"))

    def _run(self, key: str) -> None:
        compiled, batch = self.steps[key]
        params, opt_state, loss = compiled(self.state["params"], self.state["opt_state"], batch)
        self.state.update(params=params, opt_state=opt_state)
        jax.block_until_ready((params, opt_state, loss))

    def _compile(self, schedule: str, batch: dict[str, np.ndarray]) -> Any:
        num_microbatches = batch["tokens"].shape[0]
        grid = build_schedule(schedule, num_ranks=self.mesh.shape["pipe"], num_microbatches=num_microbatches)
        update: Any = self.optimizer.update

        def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
            out = pipeline_grads(self.model.fns, params=params, batch=batch, mesh=self.mesh, schedule=grid)
            updates, opt_state = update(out.grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, out.loss

        state = self.state["params"], self.state["opt_state"]
        shardings = (*jax.tree.map(lambda leaf: leaf.sharding, state), None)
        return jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings).lower(*state, batch).compile()


def make_batch(config: ModelConfig, num_microbatches: int, num_sequences: int) -> dict[str, np.ndarray]:
    """Return random tokens, targets and weights [M, B, T] whose weighted losses add up to their mean."""
    shape = (num_microbatches, num_sequences, config.max_tokens)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return {"tokens": tokens, "targets": tokens, "weights": np.full(shape, 1 / tokens.size, np.float32)}


def _open(num_devices: int) -> dict[str, Callable[..., Any]]:
    mesh = build_mesh(MeshSpec(pipe=num_devices))
    model = split_transformer(CONFIG, mesh=mesh, rules=model_rules(CONFIG, mesh.shape))
    optimizer: Any = optax.adamw(1e-3)
    params = model.init(0)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    places: Any = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, params),
        model.shardings,
        transform_non_params=lambda _: replicated,
    )
    state = {"params": params, "opt_state": jax.jit(optimizer.init, out_shardings=places)(params)}
    bench = StepBench(model=model, mesh=mesh, optimizer=optimizer, state=state)
    return {"compile": bench.compile, "step": bench.step, "bubbles": bench.bubbles, "about": _about}


def _about() -> dict[str, Any]:
    return {"jax": jax.__version__, "python": sys.version.split()[0], "num_devices": jax.device_count()}


if __name__ == "__main__":
    start_devices(int(sys.argv[1]))
    serve(_open(int(sys.argv[1])))
