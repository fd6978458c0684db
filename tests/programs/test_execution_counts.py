"""Counts of executions equal those of a profile, and counts by hand."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.meshes.scopes import RARELY
from trellax.programs import hlo_text
from trellax.programs.execution_counts import Assumed, ExecutionCounts, count_executions
from trellax.programs.hlo import HloModule
from trellax.programs.work import count_work

from .steps import compiled_step, place_zeros, really_executed, setup_of


def count(compiled: Any, num_devices: int) -> tuple[HloModule, ExecutionCounts]:
    program = HloModule.parse(hlo_text(compiled))
    return program, count_executions(program, num_devices=num_devices)


def runs_of_dots(compiled: Any, num_devices: int = 1) -> list[list[int]]:
    """Runs of every product, device by device."""
    program, executions = count(compiled, num_devices)
    operations = count_work(program, executions, num_devices=num_devices).operations
    return sorted(operation.count.tolist() for operation in operations if operation.kind == "matrix")


def compile_for(x: Any, function: Any) -> Any:
    return jax.jit(function).lower(x).compile()


SQUARE = np.ones((32, 32), np.float32)


@pytest.mark.parametrize(
    ("mesh", "schedule"), [("2x2x2", "1f1b"), pytest.param("1x1x4", "zb-h1", marks=pytest.mark.slow)]
)
def test_counts_are_those_of_a_profile(mesh: str, schedule: str) -> None:
    extra = f"--pipeline.schedule {schedule}"
    setup, compiled = setup_of(mesh, extra), compiled_step(mesh, extra)
    num_devices = setup.mesh.devices.size
    program, executions = count(compiled, num_devices)
    arguments = place_zeros((setup.shapes, setup.batch_shapes, setup.peak_rate_shape))
    seen = really_executed(lambda: compiled(*arguments))
    operations = count_work(program, executions, num_devices=num_devices).operations
    expected = {o.name: int(o.count.sum()) for o in operations if o.kind in ("matrix", "communication")}
    assert {name: seen[name] for name in expected} == expected
    # Not every other instruction leaves an event, but those that do ran as often as counted.
    others = {o.name: int(o.count.sum()) for o in operations if o.kind == "vector" and o.name in seen}
    assert len(others) > 100
    assert {name: seen[name] for name in others} == others
    assert executions.notes == ()


def test_loops_multiply_the_counts_of_their_bodies() -> None:
    def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.fori_loop(0, 3, lambda _, y: y @ y, x), None

    compiled = compile_for(SQUARE, lambda x: jax.lax.scan(step, x, None, length=5)[0])
    assert runs_of_dots(compiled) == [[15]]


def test_branches_chosen_by_a_table_are_counted_exactly() -> None:
    table: Any = np.random.default_rng(0).integers(0, 3, 40)

    def step(x: jax.Array, kind: jax.Array) -> tuple[jax.Array, None]:
        branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
        return jax.lax.switch(kind, branches, x), None

    compiled = compile_for(SQUARE, lambda x: jax.lax.scan(step, x, table)[0])
    ones, twos = int((table == 1).sum()), int((table == 2).sum())
    assert runs_of_dots(compiled) == sorted([[ones], [twos], [twos]])


def test_branches_chosen_by_the_device_are_counted_for_each_device() -> None:
    mesh = setup_of("4x2x1").mesh

    def body(x: jax.Array) -> jax.Array:
        def step(turn: jax.Array, x: jax.Array) -> jax.Array:
            return jax.lax.cond(turn < jax.lax.axis_index("data"), lambda x: x @ x, lambda x: x, x)

        return jax.lax.fori_loop(0, 10, step, x)

    spread = partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    compiled = compile_for(jnp.ones((128, 32)), spread(body))
    assert runs_of_dots(compiled, 8) == [[0, 0, 1, 1, 2, 2, 3, 3]]


def test_a_branch_that_depends_on_data_counts_as_the_heaviest_and_is_noted() -> None:
    compiled = compile_for(SQUARE, lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x))
    assert runs_of_dots(compiled) == [[1]]
    (note,) = count(compiled, 1)[1].notes
    assert "depends on data; the heaviest is counted every time" in note


def test_a_loop_that_depends_on_data_counts_once_and_is_noted() -> None:
    compiled = compile_for(SQUARE, lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x))
    assert runs_of_dots(compiled) == [[1]]
    (note,) = count(compiled, 1)[1].notes
    assert "iterations depend on data; counted as 1" in note


def test_a_loop_that_nearly_always_has_no_iteration_is_not_counted() -> None:
    def run(x: jax.Array) -> jax.Array:
        with jax.named_scope(RARELY):
            return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ x, x)

    compiled = compile_for(SQUARE, run)
    assert runs_of_dots(compiled) == []
    (note,) = count(compiled, 1)[1].notes
    assert "iterations depend on data; counted as 0" in note


def test_loops_and_branches_that_depend_on_data_do_what_is_assumed_of_their_scope() -> None:
    def step(x: jax.Array) -> jax.Array:
        with jax.named_scope("blocks"):
            x = jax.lax.fori_loop(0, x[0, 0].astype(int), lambda _, y: y @ y, x)
        with jax.named_scope("sampling"):
            return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)

    program = HloModule.parse(hlo_text(compile_for(SQUARE, step)))
    assumed = Assumed(iterations={"blocks": 5}, lightest=("sampling",))
    counts = count_executions(program, num_devices=1, assumed=assumed)
    products = [o for o in count_work(program, counts, num_devices=1).operations if o.kind == "matrix"]
    assert [o.count.tolist() for o in products] == [[5]]
    assert counts.notes == ()
    without = count_executions(program, num_devices=1)
    assert sorted(o.count[0] for o in count_work(program, without, num_devices=1).operations if o.kind == "matrix") == [
        1,
        1,
        1,
    ]
    assert len(without.notes) == 2
