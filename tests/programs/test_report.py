"""The report of a training step against the compiler's own numbers and against counting by hand."""

import jax
import numpy as np
import pytest
from trellax.programs import inspect_compiled
from trellax.programs.memory import device_bytes, total_bytes

from .steps import compiled_step, report_of, setup_of

FIVE_MESHES = ["2x2x2", "1x4x2", "2x1x4", "2x2x1", "4x2x1"]

on_five_meshes = pytest.mark.parametrize("mesh", FIVE_MESHES)


@on_five_meshes
def test_memory_adds_up_to_the_compilers_total(mesh: str) -> None:
    memory = report_of(mesh).memory
    stats = compiled_step(mesh).memory_analysis()
    assert memory.total == total_bytes(stats)
    assert sum(memory.classes.values()) == memory.total
    assert min(memory.classes.values()) > 0


@on_five_meshes
def test_state_and_batch_are_the_arguments(mesh: str) -> None:
    memory, setup = report_of(mesh).memory, setup_of(mesh)
    counters = sum(
        leaf.dtype.itemsize for leaf in jax.tree.leaves((setup.shapes.step, setup.shapes.health, setup.peak_rate_shape))
    )
    # Each device holds its part of the batch.
    batch = device_bytes(setup.batch_shapes)
    stats = compiled_step(mesh).memory_analysis()
    assert memory.parameters + memory.optimizer + counters + batch == stats.argument_size_in_bytes


def test_gradients_of_a_pipeline_are_as_large_as_the_parameters() -> None:
    memory = report_of("2x2x2").memory
    assert memory.gradients == memory.parameters


def test_activations_in_flight_do_not_grow_with_microbatches() -> None:
    eight = report_of("2x2x2", "--pipeline.microbatches 8 --train.batch_size 64").memory.activations
    assert eight == report_of("2x2x2").memory.activations


def test_loops_that_follow_each_other_count_their_arrays_once() -> None:
    """With overlap the turns run in three loops, which hand on the same buffers, one slot larger."""
    more = "--pipeline.microbatches 8 --train.batch_size 64 --pipeline.overlap"
    on, off = (report_of("2x1x2", f"{more} {choice}").memory for choice in ("on", "off"))
    assert on.gradients == off.gradients == on.parameters
    # 3 slots of residuals where there were 2, and none of the rest.
    assert off.activations < on.activations < 1.6 * off.activations
    assert on.temporary > 0


SCORES = 4 * 32 * 32 * 4 * (2 * 32 * 32)
"""Flops of scores that the mask hides or the backward makes again, in 4 layers, 32 sequences of 32 tokens, width 32.

A block of 32 queries makes all 32 x 32 scores, in two products forward and five backward; the mathematics needs half of
two and four: four whole products less.
"""


@on_five_meshes
def test_executed_products_are_those_of_the_formula(mesh: str) -> None:
    report = report_of(mesh)
    assert report.recompute_flops == SCORES / setup_of(mesh).mesh.devices.size
    assert report.model_flops
    assert report.flops["matrix"] == report.model_flops + SCORES / setup_of(mesh).mesh.devices.size


def test_full_rematerialisation_recomputes_the_blocks() -> None:
    report = report_of("1x1x2", "--pipeline.remat full")
    width, tokens_per_device, layers = 32, 32 * 32 / 2, 4
    # All products of a block's forward but the last, whose result no backward needs. Of the two that attention has, the
    # scores are what its backward makes anyway: XLA makes them once.
    again = 2 * (4 * width**2 + 4 * width**2) + 2 * 32 * width
    assert report.recompute_flops == layers * tokens_per_device * again + SCORES / 2


def test_traffic_belongs_to_its_axis_in_any_order_of_devices() -> None:
    devices = np.array(jax.devices()[:8])[[5, 0, 3, 6, 1, 7, 2, 4]].reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("rows", "columns"))
    x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=jax.NamedSharding(mesh, jax.P("rows", "columns")))
    compiled = jax.jit(lambda x: (x.sum(0), x.sum(1))).lower(x).compile()
    report = inspect_compiled(compiled, mesh)
    sent = {row.axis: row.bytes for row in report.traffic if row.kind == "all kinds"}
    # Sums of 32 numbers over four rows, of 16 over two columns.
    assert sent == {"rows": 2 * 3 / 4 * 32 * 4, "columns": 2 * 1 / 2 * 16 * 4}


def test_report_of_a_users_own_function_needs_its_mesh_alone() -> None:
    mesh = setup_of("4x2x1").mesh
    x = jax.ShapeDtypeStruct((64, 64), "float32", sharding=jax.NamedSharding(mesh, jax.P("data")))
    compiled = jax.jit(lambda x: x.sum(0)).lower(x).compile()
    report = inspect_compiled(compiled, mesh)
    assert [(row.axis, row.kind, row.count, row.bytes) for row in report.traffic] == [
        ("data", "all-reduce", 1, 2 * 3 / 4 * 64 * 4),
        ("data", "all kinds", 1, 2 * 3 / 4 * 64 * 4),
    ]
    assert (report.flops["matrix"], report.fits, report.recompute_flops) == (0, None, None)
