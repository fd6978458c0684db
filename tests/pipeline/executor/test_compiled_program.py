"""The compiled program of a step: its collectives, its size and its memory.

A mesh of 2x2x2 with 1F1B, and with ZB-H1, whose backwards are in halves, and with a vocabulary split over pipe; the
size of a microbatch stays, only their number changes.
"""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import pytest
from trellax.layers import ModelConfig
from trellax.pipeline import build_schedule, pipeline_grads
from trellax.pipeline.schedules import Vocab
from trellax.programs.groups import Groups
from trellax.programs.hlo import HloModule

from ..hlo import Collective, collectives_of
from ..law import Step, mesh_of, pipeline_step, small_model
from ..loop_weights import made_of_weights

NUM_ARRAYS_SUMMED_BESIDES_GRADIENTS = 1
"""The loss."""


every_schedule = pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
either_vocabulary = pytest.mark.parametrize("vocab", ["ends", "split"])


@cache
def step_of(schedule: str, num_microbatches: int, vocab: Vocab = "ends", num_layers: int = 8) -> Step:
    return pipeline_step(
        replace(small_model(), num_layers=num_layers),
        mesh="2x2x2",
        schedule=schedule,
        num_microbatches=num_microbatches,
        num_sequences=4 * num_microbatches,
        num_chunks=num_chunks_of(schedule),
        vocab=vocab,
    )


def num_chunks_of(schedule: str) -> int:
    return 2 if schedule.startswith("interleaved") else 1


@cache
def compiled(schedule: str, num_microbatches: int, vocab: Vocab = "ends") -> Any:
    """The step without the gradient norm, whose sums over the mesh are not the pipeline's."""
    step = step_of(schedule, num_microbatches, vocab)
    plan = build_schedule(
        schedule,
        num_ranks=2,
        num_microbatches=num_microbatches,
        num_chunks=num_chunks_of(schedule),
        vocab=vocab,
    )
    run = partial(pipeline_grads, step.model.fns, mesh=mesh_of("2x2x2"), schedule=plan)
    return jax.jit(run).lower(params=step.params, batch=step.batch).compile()


@cache
def program(schedule: str, num_microbatches: int, vocab: Vocab = "ends") -> HloModule:
    return HloModule.parse(compiled(schedule, num_microbatches, vocab).as_text())


def crosses_data(collective: Collective) -> bool:
    """Devices are numbered over (pipe, data, tensor), two each: bit 1 is the place along data."""
    return any(len({device >> 1 & 1 for device in group}) > 1 for group in collective.groups)


@either_vocabulary
@every_schedule
def test_nothing_crosses_data_inside_the_loop_over_turns(schedule: str, vocab: Vocab) -> None:
    found = program(schedule, 4, vocab)
    assert [c for c in collectives_of(found) if c.is_in_loop and crosses_data(c)] == []


@either_vocabulary
@every_schedule
def test_every_gradient_is_summed_over_data_exactly_once(schedule: str, vocab: Vocab) -> None:
    sums = [c for c in collectives_of(program(schedule, 4, vocab)) if crosses_data(c)]
    num_gradients = len(jax.tree.leaves(step_of(schedule, 4).params))
    assert {c.kind for c in sums} == {"all-reduce"}
    assert sum(c.num_arrays for c in sums) == num_gradients + NUM_ARRAYS_SUMMED_BESIDES_GRADIENTS


@every_schedule
def test_gradients_are_summed_in_two_all_reduces(schedule: str) -> None:
    """One of the stages' over data, one of what the pipe shares over pipe and data."""
    sums = [c for c in collectives_of(program(schedule, 4)) if crosses_data(c)]
    assert sorted(c.groups for c in sums) == [((0, 2), (1, 3), (4, 6), (5, 7)), ((0, 2, 4, 6), (1, 3, 5, 7))]


@every_schedule
def test_tensor_ranks_communicate_inside_the_loop(schedule: str) -> None:
    """The reader of loops finds in them the collectives that must be there."""
    found = program(schedule, 4)
    pairs = {c.groups for c in collectives_of(found) if c.kind == "all-reduce" and c.is_in_loop}
    assert pairs == {((0, 1), (2, 3), (4, 5), (6, 7))}


def test_halves_sum_over_tensor_as_often_as_a_whole_backward() -> None:
    def num_sums(schedule: str) -> int:
        found = program(schedule, 4)
        return sum(c.num_arrays for c in collectives_of(found) if c.kind == "all-reduce" and c.is_in_loop)

    assert num_sums("zb-h1") == num_sums("1f1b")


@every_schedule
def test_activations_and_gradients_pass_between_neighbours_alone(schedule: str) -> None:
    permutes = [c.groups for c in collectives_of(program(schedule, 4)) if c.kind == "collective-permute"]
    assert sorted(permutes) == [((0, 4), (1, 5), (2, 6), (3, 7)), ((4, 0), (5, 1), (6, 2), (7, 3))]


def test_a_split_vocabulary_costs_four_sums_of_an_activation_over_pipe() -> None:
    found = program("1f1b", 4, "split")
    over_pipe, over_pipe_and_tensor = ((0, 4), (1, 5), (2, 6), (3, 7)), ((0, 1, 4, 5), (2, 3, 6, 7))

    def num_sums(groups: Groups) -> int:
        sums = [c for c in collectives_of(found) if c.is_in_loop and c.groups == groups and c.kind == "all-reduce"]
        return sum(c.num_arrays for c in sums)

    # What enters the first stage, what left the last, and the gradient of the former.
    assert num_sums(over_pipe) == 3
    # The gradient of the latter, and of the loss three of [b, T] each: maximum, normalizer and the target's logit.
    assert num_sums(over_pipe_and_tensor) == 1 + 3


@either_vocabulary
@every_schedule
def test_nothing_is_gathered(schedule: str, vocab: Vocab) -> None:
    assert {c.kind for c in collectives_of(program(schedule, 4, vocab))} == {"all-reduce", "collective-permute"}


def test_loops_only_slice_the_stack_of_weights() -> None:
    config = small_model(style="llama", attention="gqa")
    sizes = {"num_microbatches": 2, "num_sequences": 8}
    step = pipeline_step(config, mesh="2x2x2", schedule="1f1b", **sizes)
    text: Any = jax.jit(step.run).lower(step.params, step.batch).compile().as_text()
    made = made_of_weights(HloModule.parse(text))
    # Of queries with keys and values, of what mixes heads, of gate with up, and of down: forward and backward.
    assert [one.kinds for one in made] == [{"dynamic-slice"}] * 8
    assert sum(one.num_bytes for one in made) == 2 * 4 * block_matrices(config) // 2


def block_matrices(config: ModelConfig) -> int:
    """Number of elements in the matrices of a layer."""
    d = config.hidden_size
    return 2 * d * config.query_size + 2 * d * config.kv_size + 3 * d * config.ffn_size


@pytest.mark.parametrize(
    ("schedule", "vocab"),
    [
        ("1f1b", "ends"),
        ("zb-h1", "ends"),
        ("1f1b", "split"),
        pytest.param("gpipe", "split", marks=pytest.mark.slow),
        pytest.param("interleaved-1f1b", "split", marks=pytest.mark.slow),
    ],
)
def test_program_does_not_grow_with_the_microbatches(schedule: str, vocab: Vocab) -> None:
    few, many = (program(schedule, m, vocab).num_instructions for m in (4, 64))
    assert many / few <= 1.05


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["naive", "interleaved-zb-h1", "auto"])
def test_other_programs_do_not_grow_either(schedule: str) -> None:
    few, many = (program(schedule, m).num_instructions for m in (4, 64))
    assert many / few <= 1.05


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved-zb-h1", marks=pytest.mark.slow)])
def test_program_does_not_grow_with_the_layers(schedule: str) -> None:
    def num_instructions(num_layers: int) -> int:
        step = step_of(schedule, 4, "split", num_layers)
        text: Any = jax.jit(step.run).lower(step.params, step.batch).compile().as_text()
        return HloModule.parse(text).num_instructions

    assert num_instructions(96) / num_instructions(12) <= 1.05


@every_schedule
def test_memory_does_not_grow_with_the_microbatches(schedule: str) -> None:
    few, many = (compiled(schedule, m).memory_analysis().temp_size_in_bytes for m in (4, 64))
    assert many == pytest.approx(few, rel=0.02)
