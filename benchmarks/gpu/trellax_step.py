"""A worker of the GPU benchmark: measure time, memory and profile of trellax's training step of one shape.

Arguments: shape, tokens per sequence, number of steps to time, then config overrides. It prints one line of JSON.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from trellax.configs import RunConfig, load_config
from trellax.train.xla import prepare_backend

from benchmarks.gpu.shapes import SHAPES, Shape

PEAK_SIZE = 8192
"""Rows of the square matrices whose product measures the peak."""

VECTOR_SHARE = 1 / 15
"""float32 flops of the vector units over bfloat16 flops of the matrix units: 67 of 990 Tflop/s on an H100."""


def config_of(shape: Shape, seq_len: int, overrides: list[str], folder: str) -> RunConfig:
    """Return the config of a shape, written as a user would."""
    names = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size")
    lines = [
        "[model]",
        *(f"{name} = {getattr(shape, name)}" for name in names),
        f"max_tokens = {seq_len}",
        'mlp = "swiglu"\nnorm = "rmsnorm"\npositions = "rotary"',
        'bias = "off"\nembeddings = "untied"\ndtype = "bfloat16"',
        f"[data]\nseq_len = {seq_len}",
        f"[train]\nsteps = 100\nbatch_size = {shape.tokens // seq_len}",
        "[optimizer]\nlearning_rate = 3e-4",
        f"[pipeline]\nmicrobatches = {shape.tokens // shape.microbatch_tokens}",
    ]
    file = Path(folder, "gpu.toml")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_config(file, overrides)


def main() -> None:
    name, seq_len, num_steps, *overrides = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(SHAPES[name], int(seq_len), overrides, folder)
        prepare_backend()
        print(json.dumps(measure(config, num_steps=int(num_steps), folder=Path(folder))), flush=True)


def measure(config: RunConfig, *, num_steps: int, folder: Path) -> dict[str, Any]:
    """Compile, run, time and profile the training step of a config on the first device."""
    import jax
    from trellax.commands.inspect_step import compile_step, report_step
    from trellax.meshes import MeshSpec, build_mesh
    from trellax.train.state import Setup

    device = jax.devices()[0]
    setup = Setup(config, build_mesh(MeshSpec(), devices=[device]))
    compiled, compile_s = compile_step(setup)
    batch = make_batch(setup)
    state, loss, times_s = time_steps(compiled, setup.init_state(), (batch, setup.peak_rate), num_steps=num_steps)
    row = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "loss_after_3": loss,
        "compile_s": compile_s,
        "step_s": statistics.median(times_s),
        "step_min_s": min(times_s),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }

    def predict() -> dict[str, Any]:
        report = report_step(compiled, setup, hardware=find_hardware(device))
        bound_s, recomputed = report.step_bound_s, report.recompute_flops
        return {"predicted_bytes": report.memory.total, "roofline_s": bound_s, "recompute_flops": recomputed}

    def profile() -> dict[str, Any]:
        traced, _ = compile_step(setup, is_traced=True)
        trace_steps(traced, state, (batch, setup.peak_rate), folder=folder / "profile", num_steps=2)
        return describe_profile(folder / "profile", traced, find_hardware(device), num_steps=2)

    # The times are kept even if one of these parts fails on a machine that nobody has tried.
    parts = {"peak": partial(find_peak, device), "prediction": predict, "profile": profile}
    return row | run_parts(parts)


def run_parts(parts: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Merge the results of all parts, with the errors of failed ones under "failed"."""
    found: dict[str, Any] = {"failed": {}}
    for name, part in parts.items():
        try:
            found |= part()
        except Exception as error:
            found["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    return found


def trace_steps(compiled: Any, state: Any, inputs: tuple[Any, ...], *, folder: Path, num_steps: int) -> None:
    """Profile more steps; they consume the state."""
    import jax

    with jax.profiler.trace(str(folder)):
        for _ in range(num_steps):
            state, _ = compiled(state, *inputs)
        jax.block_until_ready(state)


def time_steps(compiled: Any, state: Any, inputs: tuple[Any, ...], *, num_steps: int) -> tuple[Any, float, list[float]]:
    """Run three warm-up steps, then timed ones; return the state, the loss of the third step, and the times."""
    import jax

    loss, times_s = 0.0, []
    for step in range(3 + num_steps):
        start_s = time.perf_counter()
        state, metrics = compiled(state, *inputs)
        jax.block_until_ready(metrics)
        times_s.append(time.perf_counter() - start_s)
        loss = float(metrics.loss) if step == 2 else loss
    return state, loss, times_s[3:]


def describe_profile(folder: Path, compiled: Any, hardware: Any, *, num_steps: int) -> dict[str, Any]:
    """Return seconds per step by class, the longest operations, and the largest losses against the roofline."""
    from trellax.programs.trace import list_operations, sum_classes

    found = list_operations(folder, compiled, num_devices=1, hardware=hardware)
    lost: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for one in found:
        # One line of the model makes an instruction in every layer; count them as one loss.
        key = f"{one.kind}: {'/'.join(one.op_name.split('/')[-3:]) or one.name.rstrip('.0123456789')}"
        lost[key][0] += one.time_s / num_steps
        lost[key][1] += one.bound_s / num_steps
    losses = sorted(lost.items(), key=lambda item: item[1][1] - item[1][0])
    return {
        "classes_s": {kind: time_s / num_steps for kind, time_s in sum_classes(found).items()},
        "top": [
            {"name": one.name, "kind": one.kind, "op_name": one.op_name[-80:], "ms": 1e3 * one.time_s / num_steps}
            for one in found[:10]
        ],
        "losses": [{"what": key, "ms": 1e3 * time_s, "bound_ms": 1e3 * bound} for key, (time_s, bound) in losses[:3]],
    }


def find_hardware(device: Any) -> Any:
    """Return the device's peaks from XLA's description of it, or measure those of a CPU."""
    from trellax.meshes import TargetError
    from trellax.programs import hardware_from_description, list_gpus, measure_host

    if device.platform == "cpu":
        return measure_host(num_devices=1, memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    words = device.device_kind.lower().removeprefix("nvidia ").split()
    try:
        known = list_gpus()
    except TargetError:
        # Only jax 0.12's plugin brings descriptions.
        return _from_data_sheet(device)
    name = next((name for name in known if name.split("-")[0] == words[0] and len(name.split("-")) == len(words)), None)
    name = name or next((name for name in known if name.startswith(words[0])), None)
    if name is None:
        raise LookupError(f"{device.device_kind} is none of {', '.join(known)}")
    return hardware_from_description(known[name])


def _from_data_sheet(device: Any) -> Any:
    """Return the peaks of a device that the planner knows."""
    from trellax.plan.machines.detect import match_accelerator
    from trellax.programs.hardware import Hardware

    known = match_accelerator(device.device_kind)
    if known is None:
        raise LookupError(f"the planner has no data sheet of {device.device_kind}")
    peaks = {"bf16": known.flops_per_s["bfloat16"], "f32": known.flops_per_s["float32"]}
    return Hardware(
        name=known.key,
        memory_bytes=known.memory_bytes,
        memory_bytes_per_s=known.memory_bytes_per_s,
        matrix_flops_per_s=peaks | {"f8e4m3fn": known.flops_per_s.get("float8", 0.0)},
        vector_flops_per_s=VECTOR_SHARE * peaks["bf16"],
        link_bytes_per_s=known.link_bytes_per_s,
        network_bytes_per_s=known.network_bytes_per_s,
    )


def find_peak(device: Any) -> dict[str, Any]:
    """Measure the matmul rate that MFU is relative to."""
    return {"peak_flops_per_s": measure_peak(512 if device.platform == "cpu" else PEAK_SIZE)}


def measure_peak(size: int) -> float:
    """Return the best rate of a few bfloat16 products of square matrices, in flop/s."""
    import jax
    import jax.numpy as jnp

    # Random numbers: on zeros or ones fewer transistors switch, and a GPU runs an eighth faster than with real data.
    # Scaled so that products stay as large as their factors.
    matrix = (jax.random.normal(jax.random.key(0), (size, size)) * size**-0.5).astype(jnp.bfloat16)
    # A chain of products, so that launch times do not count.
    multiply = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: y @ x, x))
    jax.block_until_ready(multiply(matrix))
    times_s = []
    for _ in range(3):
        start_s = time.perf_counter()
        jax.block_until_ready(multiply(matrix))
        times_s.append(time.perf_counter() - start_s)
    return 10 * 2 * size**3 / min(times_s)


def make_batch(setup: Any) -> Any:
    """Return random tokens in the shape of the run's batches, on the device."""
    import jax
    import numpy as np

    shapes, config = setup.batch_shapes, setup.config
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shapes["tokens"].shape, dtype=np.int32)
    weights = np.full(tokens.shape, 1 / tokens.size, np.float32)
    leaves = {"tokens": tokens, "targets": np.roll(tokens, -1, axis=-1), "weights": weights}
    return {key: jax.device_put(leaf, shapes[key].sharding) for key, leaf in leaves.items()}


if __name__ == "__main__":
    main()
