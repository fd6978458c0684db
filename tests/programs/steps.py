"""Compile small training steps, once a session, and count in a profile the instructions that they run."""

import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from trellax.commands.inspect_step import compile_step, report_step
from trellax.configs import load_config
from trellax.meshes import build_mesh
from trellax.programs import ProgramReport, hlo_text
from trellax.programs.collectives import Collective, list_collectives
from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import HloModule
from trellax.train import Setup

SPLIT = "--pipeline.vocab split"

SIZES = "--model.num_layers 4 --data.seq_len 32 --train.batch_size 32 --pipeline.microbatches 4"
"""Eight sequences a microbatch, 32 tokens each, width 32, 4 heads; a boundary of 32 KiB over all data shards."""


@cache
def setup_of(mesh: str, extra: str = "", config: str = "tiny-dense") -> Setup:
    """The run of a config on a mesh written as data x tensor x pipe; the vocabulary on the ends unless `extra` says."""
    data, tensor, pipe = mesh.split("x")
    extra = extra if "pipeline.vocab" in extra else f"{extra} --pipeline.vocab ends"
    words = f"{SIZES} --mesh.data {data} --mesh.tensor {tensor} --mesh.pipe {pipe} {extra}"
    run = load_config(config, words)
    return Setup(run, build_mesh(run.mesh, devices=jax.devices()[: run.mesh.num_devices]))


@cache
def compiled_step(mesh: str, extra: str = "", config: str = "tiny-dense") -> Any:
    """Its training step."""
    return compile_step(setup_of(mesh, extra, config))[0]


@cache
def report_of(mesh: str, extra: str = "", config: str = "tiny-dense") -> ProgramReport:
    """The report of its training step."""
    return report_step(compiled_step(mesh, extra, config), setup_of(mesh, extra, config))


def collectives_of(compiled: Any, mesh: jax.sharding.Mesh) -> tuple[Collective, ...]:
    """All collectives of a compiled program."""
    program = HloModule.parse(hlo_text(compiled))
    executions = count_executions(program, num_devices=mesh.devices.size)
    assert executions.notes == ()
    return list_collectives(program, executions, mesh=mesh)


def really_executed(run: Callable[[], Any]) -> Counter[str]:
    """How often each instruction ran on all devices together, by name: CPU records an event for each."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.xplane.pb")
        data: Any = jax.profiler.ProfileData.from_file(str(path))
        return Counter(event.name for plane in data.planes for line in plane.lines for event in line.events)


def place_zeros(shapes: Any) -> Any:
    """Arrays of zeros for a tree of shapes with shardings."""
    return jax.tree.map(lambda shape: jax.device_put(np.zeros(shape.shape, shape.dtype), shape.sharding), shapes)
