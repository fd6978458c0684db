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
from trellax.pipeline import pipeline_grads
from trellax.pipeline.executor.backward.equations import nested_equations
from trellax.programs.groups import Groups
from trellax.programs.hlo import HloModule
from trellax.schedules import Vocab, build_schedule

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


@either_vocabulary
@every_schedule
def test_activations_and_gradients_pass_between_neighbours_alone(schedule: str, vocab: Vocab) -> None:
    permutes = [c.groups for c in collectives_of(program(schedule, 4, vocab)) if c.kind == "collective-permute"]
    assert sorted(permutes) == [((0, 4), (1, 5), (2, 6), (3, 7)), ((4, 0), (5, 1), (6, 2), (7, 3))]


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", pytest.param("interleaved-1f1b", marks=pytest.mark.slow)])
@either_vocabulary
def test_no_branch_but_the_exchange_permutes(schedule: str, vocab: Vocab) -> None:
    """XLA lets all devices take part in a permute, so one in a branch that not all of them take would never end."""
    permutes = [c for c in collectives_of(program(schedule, 4, vocab)) if c.kind == "collective-permute"]
    assert [c.is_in_branch for c in permutes] == [True, True]
    assert [c.scope for c in permutes if "/exchange/cond/" not in c.scope] == []


OVER_PIPE, OVER_TENSOR = ((0, 4), (1, 5), (2, 6), (3, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))
OVER_PIPE_AND_TENSOR = ((0, 1, 4, 5), (2, 3, 6, 7))
SLICE, WHOLE = (1, 16, 64), (2, 16, 64)
"""An activation [b, T, D], and the part of it that one of two tensor ranks sends over pipe."""


def shapes_in_loop(found: HloModule, kind: str, groups: Groups) -> list[tuple[int, ...]]:
    """Shapes of the arrays that communications of a kind between these groups carry, or return, in a turn."""
    ours = (c for c in collectives_of(found) if c.is_in_loop and c.kind == kind and c.groups == groups)
    return sorted(shape for c in ours for shape in c.shapes)


def test_a_split_vocabulary_costs_four_sums_over_pipe_of_a_slice_from_each_tensor_rank() -> None:
    found = program("1f1b", 4, "split")
    # What enters the first stage, what left the last, and the gradients of both.
    assert shapes_in_loop(found, "all-reduce", OVER_PIPE) == 4 * [SLICE]
    # Of the loss three: maximum, normalizer and the target's logit.
    assert shapes_in_loop(found, "all-reduce", OVER_PIPE_AND_TENSOR) == 3 * [WHOLE[:2]]


def test_slices_of_activations_are_gathered_over_tensor_and_nothing_else_is() -> None:
    found = program("1f1b", 4, "split")
    # One for each of the four sums; the way of dx back through the sum of what enters the first stage is free.
    assert shapes_in_loop(found, "all-gather", OVER_TENSOR) == 4 * [WHOLE]
    # Of what each tensor rank has made of its part of the vocabulary: of x in `first`, of dy in `last`.
    assert shapes_in_loop(found, "reduce-scatter", OVER_TENSOR) == 2 * [SLICE]
    others = [c for c in collectives_of(found) if c.kind in ("all-gather", "reduce-scatter")]
    assert len(others) == 4 + 2


@every_schedule
def test_with_the_vocabulary_at_the_ends_nothing_is_gathered(schedule: str) -> None:
    assert {c.kind for c in collectives_of(program(schedule, 4))} == {"all-reduce", "collective-permute"}


@either_vocabulary
def test_activations_cross_pipe_in_the_compute_dtype(vocab: Vocab) -> None:
    """Read from the program that the compiler is given, since XLA:CPU makes float32 of all bfloat16 it sends."""
    config = small_model(dtype="bfloat16")
    step = pipeline_step(config, mesh="2x2x2", schedule="1f1b", num_microbatches=4, num_sequences=16, vocab=vocab)
    eqns = nested_equations(jax.make_jaxpr(step.run)(step.params, step.batch).jaxpr)
    sent: list[Any] = [v.aval for eqn in eqns if _names_pipe(eqn) for v in eqn.invars]
    activations = [aval for aval in sent if aval.shape in (SLICE, WHOLE)]
    assert {aval.dtype.name for aval in activations} == {"bfloat16"}
    # The two permutes carry it whole; with a split vocabulary all sums carry slices.
    assert {aval.shape for aval in activations} == ({SLICE, WHOLE} if vocab == "split" else {WHOLE})
    assert sum(aval.shape == WHOLE for aval in activations) == 2


def _names_pipe(eqn: Any) -> bool:
    axes = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    is_sent = eqn.primitive.name in ("ppermute", "psum", "psum_invariant", "reduce_scatter", "all_gather")
    return is_sent and "pipe" in (axes if isinstance(axes, tuple) else (axes,))


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
