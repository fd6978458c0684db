"""Compile the training step of a run from shapes alone, and report its memory, traffic and work.

The program is the one that `train` runs, made by the same `make_train_step`. No array is allocated.
"""

import time
from dataclasses import replace
from typing import Any

import jax

from ..layers import flops_per_token
from ..layers.own.counts import tell_counts
from ..meshes import ProgramError
from ..meshes.switches import xla_flags
from ..plan import StepSizes, minimum_bytes
from ..plan.costs.minimum_traffic import explain_ratios
from ..programs import Hardware, Memory, ProgramReport, inspect_compiled
from ..programs.traffic import sum_traffic
from ..schedules import simulate
from ..train.state import Setup
from ..train.step import make_train_step, step_options
from ..train.xla import MEMORY_FRACTION, SLOP, compile_for


def inspect_step(
    setup: Setup, *, hardware: Hardware | None = None, devices_per_node: int | None = None
) -> ProgramReport:
    """Compile the training step of a run for the devices of its mesh, and return the report on it.

    Model FLOPs include attention scores inside the mask. FLOPs of masked scores, and of recomputation in the backward,
    count as recomputed.

    Raises:
        ProgramError: the compiler rejects the step.
    """
    compiled, compile_s = compile_step(setup, hardware=hardware)
    return report_step(compiled, setup, hardware=hardware, devices_per_node=devices_per_node, compile_s=compile_s)


def compile_step(setup: Setup, *, hardware: Hardware | None = None, is_traced: bool = False) -> tuple[Any, float]:
    """Compile the training step; return it with the time of tracing and compiling in seconds.

    Args:
        hardware: GPUs that are not present, so that the program is the one that their memory would allow.
        is_traced: whether a profiler is to find its instructions.

    Raises:
        ProgramError: the compiler rejects the step.
    """
    start_s = time.perf_counter()
    step: Any = make_train_step(setup)
    try:
        lowered = step.lower(setup.shapes, setup.batch_shapes, setup.peak_rate_shape)
        compiled = compile_for(
            lowered,
            platform=setup.mesh.devices.flat[0].platform,
            more=step_options(setup, is_traced=is_traced),
            absent_bytes=None if hardware is None else hardware.memory_bytes,
        )
    except jax.errors.JaxRuntimeError as error:
        first_line = str(error).strip().splitlines()[0]
        raise ProgramError(
            f"XLA cannot compile the training step on {setup.sizes}: {first_line[:300]}",
            fix="try another mesh or schedule; please report the program if `train` runs it.",
        ) from error
    return compiled, time.perf_counter() - start_s


def report_step(
    compiled: Any,
    setup: Setup,
    *,
    hardware: Hardware | None = None,
    devices_per_node: int | None = None,
    compile_s: float | None = None,
) -> ProgramReport:
    """Return the report on the compiled training step of a run.

    Args:
        hardware: device to compare memory and peak rates with; neither is judged if left out.
        devices_per_node: number of devices of a node, to separate traffic within a node from that between nodes.
        compile_s: time of compiling in seconds, from `compile_step`.
    """
    config = setup.config
    num_tokens = config.train.batch_size * config.data.seq_len / setup.mesh.devices.size
    model_flops = num_tokens * flops_per_token(config.model, num_tokens=config.data.seq_len).training
    report = inspect_compiled(
        compiled,
        setup.mesh,
        parameters=setup.shapes.params,
        gradients=setup.gradient_shapes,
        optimizer=setup.shapes.opt_state,
        hardware=hardware,
        devices_per_node=devices_per_node,
    )
    sizes = step_sizes(setup)
    return replace(
        report,
        memory=_within_fraction(report.memory),
        traffic=sum_traffic(report.collectives, minimum=minimum_bytes(sizes)),
        notes=(*report.notes, *_tell_notes(setup, sizes)),
        model_flops=model_flops,
        recompute_flops=report.flops["matrix"] - model_flops,
        bubble_fraction=simulate(setup.schedule, stages=setup.stage_costs).bubble_fraction
        if setup.schedule.num_ranks > 1
        else 0.0,
        compile_s=compile_s,
    )


def _tell_notes(setup: Setup, sizes: StepSizes) -> list[str]:
    """Return what the traffic of a step and the counts of classes of the user's rest on."""
    told = tell_counts(setup.config.model)
    ratios = explain_ratios(sizes, shard=setup.config.train.shard, remat=setup.config.pipeline.remat)
    return [*([told] if told else []), *ratios]


def _within_fraction(memory: Memory) -> Memory:
    """Return the memory of a step with the limit under which `train` runs it: all that jax may allocate on a GPU."""
    if memory.capacity is None or memory.limit is None or SLOP in xla_flags():
        return memory
    return replace(memory, limit=int(MEMORY_FRACTION * memory.capacity))


def step_sizes(setup: Setup) -> StepSizes:
    """Return the sizes that determine the minimum traffic of a training step."""
    config, mesh = setup.config, setup.sizes
    num_microbatches = config.pipeline.microbatches
    return StepSizes(
        model=config.model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        num_sequences=config.train.batch_size // (num_microbatches * mesh.data),
        num_tokens=config.data.seq_len,
        num_chunks=setup.num_chunks,
        layers_per_stage=setup.layers_per_stage if mesh.pipe > 1 else None,
        vocab=config.pipeline.vocab,
        placement=setup.schedule.placement if mesh.pipe > 1 else None,
        context_attention=setup.context_attention,
    )
