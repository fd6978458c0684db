"""What the compiler made of a step: where it communicates, how large it is and how much memory it takes.

A mesh of 2x2x2 with 1F1B; the size of a microbatch stays, only their number changes.
"""

from functools import cache, partial
from typing import Any

import jax
import pytest
from trellax.pipeline import build_schedule, pipeline_grads

from .hlo import Collective, Program
from .law import Step, mesh_of, pipeline_step, small_model

NUM_ARRAYS_SUMMED_BESIDES_GRADIENTS = 1
"""The loss."""


@cache
def step_of(num_microbatches: int) -> Step:
    return pipeline_step(
        small_model(),
        mesh="2x2x2",
        schedule="1f1b",
        num_microbatches=num_microbatches,
        num_sequences=4 * num_microbatches,
    )


@cache
def compiled(num_microbatches: int) -> Any:
    """The step without the gradient norm, whose sums over the mesh are not the pipeline's."""
    step = step_of(num_microbatches)
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=num_microbatches)
    run = partial(pipeline_grads, step.model.fns, mesh=mesh_of("2x2x2"), schedule=schedule)
    return jax.jit(run).lower(params=step.params, batch=step.batch).compile()


def crosses_data(collective: Collective) -> bool:
    """Devices are numbered over (pipe, data, tensor), two each: bit 1 is the place along data."""
    return any(len({device >> 1 & 1 for device in group}) > 1 for group in collective.groups)


def test_nothing_crosses_data_inside_the_loop_over_turns() -> None:
    program = Program(compiled(4).as_text())
    in_loops = program.in_loops()
    assert [c for c in program.collectives() if c.computation in in_loops and crosses_data(c)] == []


def test_every_gradient_is_summed_over_data_exactly_once() -> None:
    sums = [c for c in Program(compiled(4).as_text()).collectives() if crosses_data(c)]
    num_gradients = len(jax.tree.leaves(step_of(4).params))
    assert {c.kind for c in sums} == {"all-reduce"}
    assert sum(c.num_arrays for c in sums) == num_gradients + NUM_ARRAYS_SUMMED_BESIDES_GRADIENTS


def test_gradients_are_summed_in_two_all_reduces() -> None:
    """One of the stages' over data, one of what the pipe shares over pipe and data."""
    sums = [c for c in Program(compiled(4).as_text()).collectives() if crosses_data(c)]
    assert sorted(c.groups for c in sums) == [((0, 2), (1, 3), (4, 6), (5, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))]


def test_tensor_ranks_talk_inside_the_loop() -> None:
    """The reading of loops works: what must be there is found there."""
    program = Program(compiled(4).as_text())
    in_loops = program.in_loops()
    pairs = {c.groups for c in program.collectives() if c.kind == "all-reduce" and c.computation in in_loops}
    assert pairs == {((0, 1), (2, 3), (4, 5), (6, 7))}


def test_activations_and_gradients_pass_between_neighbours_alone() -> None:
    permutes = [c.groups for c in Program(compiled(4).as_text()).collectives() if c.kind == "collective-permute"]
    assert sorted(permutes) == [((0, 4), (1, 5), (2, 6), (3, 7)), ((4, 0), (5, 1), (6, 2), (7, 3))]


def test_nothing_is_gathered() -> None:
    kinds = {c.kind for c in Program(compiled(4).as_text()).collectives()}
    assert kinds == {"all-reduce", "collective-permute"}


def test_program_does_not_grow_with_the_microbatches() -> None:
    few, many = (Program(compiled(m).as_text()).num_instructions for m in (4, 32))
    assert many / few <= 1.05


def test_memory_of_1f1b_does_not_grow_with_the_microbatches() -> None:
    few, many = (compiled(m).memory_analysis().temp_size_in_bytes for m in (4, 32))
    assert many == pytest.approx(few, rel=0.02)
