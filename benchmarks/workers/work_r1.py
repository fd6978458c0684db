"""A worker for work R1, a user's own model on which other JAX pipelines were measured; it uses no trellax.layers.

2 pre-norm blocks a rank (RMSNorm, causal attention with 4 heads of 32, GELU MLP of 512), width 128, sequence 128,
float32, no embedding or head, loss = mean((y - t)^2), on a mesh of pipe=4 and, with 8 devices, data=2. A microbatch has
4 sequences per data shard, so a device does the same work on both meshes. Memory is also measured on pipe=8, with 16
blocks. The pipeline and schedules benchmarks start it.
"""

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.meshes import MeshSpec, build_mesh
from trellax.pipeline import PipelineParams, StageFns, lower, pipeline_grads, stages_from_layers
from trellax.programs.hlo import HloModule, leaves
from trellax.schedules import SCHEDULES, Placement, Schedule, build_schedule

from benchmarks.workers.process import serve, start_devices
from benchmarks.workers.scopes import naive_halves, time_scopes
from benchmarks.workers.traces import count_traced, instructions_of, matmul_flops

WIDTH, NUM_TOKENS, NUM_HEADS, FFN, LAYERS_PER_RANK = 128, 128, 4, 512, 2
NUM_SEQUENCES = 4
"""In each microbatch, for every data shard."""
PIPE = 4

Remat = Literal["block", "none"]


def block(params: Any, x_bTD: jax.Array, _: Any) -> jax.Array:
    """x[B@data, T, D] -> y[B@data, T, D]: one pre-norm transformer block as a plain function."""
    h_bTD = _rms_norm(x_bTD, params["norm1"])
    b, T, D = h_bTD.shape
    q_bTNH, k_bTNH, v_bTNH = (
        (h_bTD @ params[name]).reshape(b, T, NUM_HEADS, D // NUM_HEADS) for name in ("query", "key", "value")
    )
    scores_bNTS = jnp.einsum("btnh,bsnh->bnts", q_bTNH, k_bTNH) / np.sqrt(D / NUM_HEADS).astype(np.float32)
    scores_bNTS = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores_bNTS, -1e30)
    mixed_bTNH = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores_bNTS), v_bTNH)
    x_bTD = x_bTD + mixed_bTNH.reshape(b, T, D) @ params["out"]
    return x_bTD + jax.nn.gelu(_rms_norm(x_bTD, params["norm2"]) @ params["up"]) @ params["down"]


def measure_memory(*, schedule: str, remat: Remat, num_microbatches: int, num_ranks: int = PIPE) -> float:
    """Return the compiled temporary bytes of loss and gradients on each device."""
    return _compile(schedule, remat, num_microbatches, num_ranks).memory_analysis().temp_size_in_bytes


def measure_slots(*, schedule: str, num_microbatches: int, num_ranks: int = PIPE) -> dict[str, int]:
    """Return the slots for microbatches of a chunk in the program without remat, and the bytes of their buffers."""
    grid = _build_schedule(schedule, num_microbatches, num_ranks)
    slots = lower(grid).num_residual_slots
    program = HloModule.parse(_compile(schedule, "none", num_microbatches, num_ranks).as_text())
    # The loop over turns carries residuals [slots, layers of a chunk, ...].
    lead = (slots, LAYERS_PER_RANK // grid.num_chunks)
    carried = [
        sum(array.num_bytes for array in leaves(loop.type) if array.dims[:2] == lead and len(array.dims) > len(lead))
        for loop in instructions_of(program, "while")
    ]
    return {"slots": slots, "residual_bytes": max(carried)}


def measure_work(*, schedule: str, remat: Remat, num_microbatches: int) -> dict[str, float]:
    """Run one step under the profiler; return what was executed: matmul work over the ideal, and collectives."""
    mesh, compiled = _mesh(), _compile(schedule, remat, num_microbatches)
    inputs = _inputs(mesh, _build_schedule(schedule, num_microbatches))
    jax.block_until_ready(compiled(*inputs))
    counts = count_traced(lambda: compiled(*inputs))
    program = HloModule.parse(compiled.as_text())
    flops = matmul_flops(program)
    if lost := [name for name in flops if not counts[name]]:
        raise RuntimeError(f"the trace has no execution of {', '.join(lost)}")
    # The sum of the loss is a scalar; what has dimensions is gradients.
    sums = instructions_of(program, "all-reduce")
    gradient_sums = [i.name for i in sums if any(array.dims for array in leaves(i.type))]
    permutes = [i.name for i in instructions_of(program, "collective-permute")]
    done = sum(counts[name] * work for name, work in flops.items())
    return {
        "matmul_over_ideal": done
        / _ideal_flops(num_microbatches * _num_sequences(mesh), num_layers=LAYERS_PER_RANK * PIPE),
        "gradient_all_reduces": sum(counts[name] for name in gradient_sums) / mesh.size,
        "permutes": sum(counts[name] for name in permutes) / mesh.size,
    }


def measure_actions(*, num_microbatches: int, rounds: int) -> dict[str, Any]:
    """Return seconds by scope and rank with whole backwards and with halves, one rank acting at a time."""
    inputs = _inputs(_mesh(), _build_schedule("naive", num_microbatches))
    steps = {name: (_compile(name, "none", num_microbatches), inputs) for name in ("naive", "naive-halves")}
    for compiled, _ in steps.values():
        jax.block_until_ready(compiled(*inputs))
    return time_scopes(steps, rounds=rounds)


def measure_step(*, schedule: str, num_microbatches: int) -> dict[str, float]:
    """Run one step without remat; return its wall and CPU seconds. Call it once before, to compile and warm up."""
    compiled = _compile(schedule, "none", num_microbatches)
    inputs = _inputs(_mesh(), _build_schedule(schedule, num_microbatches))
    start, cpu_start = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*inputs))
    return {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu_start}


def check_bubbles(*, schedule: str, num_microbatches: int) -> bool:
    """Tell whether loss and gradients keep every bit when bubbles are filled with NaN."""
    mesh = _mesh()
    inputs = _inputs(mesh, _build_schedule(schedule, num_microbatches))
    zeros, nan = (
        _lower(mesh, schedule, "none", num_microbatches, fill).compile()(*inputs) for fill in ("zeros", "nan")
    )
    return are_same_bits(zeros, nan)


def are_same_bits(left: Any, right: Any) -> bool:
    """Tell whether two trees of float32 arrays agree bit for bit and hold only finite numbers."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    arrays = [(np.asarray(a), np.asarray(b)) for a, b in pairs]
    return all(np.array_equal(a.view("i4"), b.view("i4")) and np.isfinite(a).all() for a, b in arrays)


def _mesh(num_ranks: int = PIPE) -> Mesh:
    return build_mesh(MeshSpec(data=jax.device_count() // num_ranks, pipe=num_ranks))


def _num_sequences(mesh: Mesh) -> int:
    return NUM_SEQUENCES * mesh.shape["data"]


@cache
def _compile(schedule: str, remat: Remat, num_microbatches: int, num_ranks: int = PIPE) -> Any:
    """Compile once for all questions about a program."""
    return _lower(_mesh(num_ranks), schedule, remat, num_microbatches).compile()


def _lower(mesh: Mesh, schedule: str, remat: Remat, num_microbatches: int, bubbles: Any = "zeros") -> Any:
    num_values = num_microbatches * _num_sequences(mesh) * NUM_TOKENS * WIDTH
    grid = _build_schedule(schedule, num_microbatches, mesh.shape["pipe"])
    fns = StageFns(
        first=lambda _, microbatch: microbatch["x"],
        layer=jax.checkpoint(block, prevent_cse=False) if remat == "block" else block,
        last=lambda _, y, microbatch: ((y - microbatch["t"]) ** 2).sum() / num_values,
        placement=grid.placement,
    )

    def step(params: PipelineParams, batch: Any) -> Any:
        return pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=grid, bubbles=bubbles)

    return jax.jit(step).lower(*_inputs(mesh, grid))


@cache
def _build_schedule(schedule: str, num_microbatches: int, num_ranks: int = PIPE) -> Schedule:
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches}
    if schedule == "naive-halves":
        return naive_halves(**sizes)
    return build_schedule(schedule, **sizes, num_chunks=SCHEDULES[schedule].default_chunks)


def _inputs(mesh: Mesh, schedule: Schedule) -> tuple[PipelineParams, dict[str, jax.Array]]:
    """Parameters [chunks, ranks@pipe, layers, ...] and batch [M, B@data, T, D]."""
    return _draw_inputs(mesh, schedule.num_microbatches, schedule.placement)


@cache
def _draw_inputs(
    mesh: Mesh, num_microbatches: int, placement: Placement
) -> tuple[PipelineParams, dict[str, jax.Array]]:
    random = np.random.default_rng(0)
    square, up, num_layers = (WIDTH, WIDTH), (WIDTH, FFN), LAYERS_PER_RANK * placement.num_ranks
    shapes = dict.fromkeys(("query", "key", "value", "out"), square) | {"up": up, "down": up[::-1]}
    weights = {name: random.normal(size=(num_layers, *own)).astype("f4") * 0.05 for name, own in shapes.items()}
    norms = dict.fromkeys(("norm1", "norm2"), np.ones((num_layers, WIDTH), np.float32))
    stages = stages_from_layers(
        weights | norms, num_ranks=placement.num_ranks, num_chunks=placement.num_chunks, placement=placement
    )
    batch_shape = (num_microbatches, _num_sequences(mesh), NUM_TOKENS, WIDTH)
    batch = {name: random.normal(size=batch_shape).astype("f4") for name in ("x", "t")}
    return (
        jax.device_put(PipelineParams(stages=stages, shared={}), NamedSharding(mesh, P(None, "pipe"))),
        jax.device_put(batch, NamedSharding(mesh, P(None, "data"))),
    )


def _ideal_flops(num_sequences: int, *, num_layers: int) -> int:
    """Matmul flops that any exact algorithm without recomputation spends: forward, and twice that backward."""
    weights = 4 * WIDTH * WIDTH + 2 * WIDTH * FFN
    per_token = 2 * weights + 2 * 2 * NUM_TOKENS * WIDTH
    return 3 * per_token * NUM_TOKENS * num_layers * num_sequences


def _rms_norm(x_bTD: jax.Array, gain_D: jax.Array) -> jax.Array:
    return x_bTD * jax.lax.rsqrt(jnp.mean(x_bTD * x_bTD, -1, keepdims=True) + 1e-6) * gain_D


CALLS: dict[str, Callable[..., Any]] = {
    "memory": measure_memory,
    "slots": measure_slots,
    "work": measure_work,
    "bubbles": check_bubbles,
    "actions": measure_actions,
    "step": measure_step,
}

if __name__ == "__main__":
    start_devices(int(sys.argv[1]))
    serve(CALLS)
