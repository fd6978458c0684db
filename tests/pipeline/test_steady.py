"""The steady state: a forward and a backward in one body give the same numbers, and messages stand in no branch."""

from dataclasses import replace
from typing import Any, cast

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from trellax.meshes import MeshSpec, ScheduleError, abstract_mesh
from trellax.pipeline import compiler_options, lower, pipeline_grads
from trellax.pipeline.executor.backward.equations import nested_equations
from trellax.pipeline.executor.grads import Overlap
from trellax.pipeline.lowering.steady import longest_run
from trellax.pipeline.lowering.tables import BACKWARD, FORWARD, NONE, Ends
from trellax.schedules import Action, Schedule, Vocab, build_schedule, schedule_from_orders

from ..schedules.sizes import named_schedules
from .law import answer_of, beyond, errors_of, one_device, pipeline_step, small_model
from .tiny import FNS, tiny_given
from .tiny import grads_of as tiny_grads

TOLERANCE = 2e-5  # as in test_law.py, for the same reason


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "case",
    [
        ("2x2x2", "1f1b", 8, "split", 1),
        ("1x1x4", "1f1b", 12, "ends", 1),
        ("2x1x2", "interleaved-1f1b", 6, "split", 2),
        slow(("1x2x4", "1f1b", 16, "split", 1)),
        slow(("1x1x2", "1f1b", 4, "ends", 1)),
        slow(("2x2x2", "interleaved-1f1b", 8, "ends", 2)),
        slow(("1x1x8", "1f1b", 24, "split", 1)),
        slow(("4x1x2", "1f1b", 24, "split", 1)),
        slow(("1x2x4", "interleaved-1f1b", 9, "split", 2)),
    ],
    ids=lambda case: "-".join(map(str, case)),
)
def test_steady_state_equals_one_device(case: tuple[str, str, int, Vocab, int]) -> None:
    mesh, schedule, num_microbatches, vocab, num_chunks = case
    config, num_sequences = small_model(style="llama", attention="gqa"), 4 * num_microbatches
    sizes = {"num_microbatches": num_microbatches, "num_chunks": num_chunks}
    plan = build_schedule(schedule, num_ranks=int(mesh[-1]), vocab=vocab, **sizes)
    step = pipeline_step(
        config, mesh=mesh, schedule=plan, vocab=vocab, num_sequences=num_sequences, overlap="on", bubbles="nan", **sizes
    )
    assert lower(plan, ends=ends_of(vocab), overlap=True).steady is not None
    assert beyond(errors_of(answer_of(step), one_device(config, num_sequences)), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize(("mesh", "num_microbatches"), [("1x1x2", 8), slow("1x2x4", 12)])
def test_a_schedule_that_takes_dy_in_the_same_tick_equals_one_device(mesh: str, num_microbatches: int) -> None:
    """Built for whole ends, run with a split vocabulary: the backward of a pair needs what its forward's loss made."""
    config, num_sequences = small_model(style="llama", attention="gqa"), 4 * num_microbatches
    sizes = {"num_microbatches": num_microbatches, "num_sequences": num_sequences}
    plan = build_schedule("1f1b", num_ranks=int(mesh[-1]), num_microbatches=num_microbatches, vocab="ends")
    step = pipeline_step(config, mesh=mesh, schedule=plan, vocab="split", overlap="on", bubbles="nan", **sizes)
    assert beyond(errors_of(answer_of(step), one_device(config, num_sequences)), tolerance=TOLERANCE) == {}


@pytest.mark.slow
@pytest.mark.parametrize("vocab", ["ends", "split"])
def test_pairs_of_a_v_send_to_both_sides_and_equal_one_device(vocab: Vocab) -> None:
    """DualPipeV with whole backwards: a forward of one chunk beside a backward of the other."""
    halves = build_schedule("dualpipev", num_ranks=4, num_microbatches=16, num_chunks=2)
    orders: list[list[Action]] = [[] for _ in range(4)]
    for _, rank, action in halves.placed():
        if action.kind != "W":
            orders[rank].append(replace(action, kind="B" if action.kind == "I" else action.kind))
    given = {"num_microbatches": 16, "num_chunks": 2, "vocab": vocab}
    plan = schedule_from_orders(orders, name="whole", placement=halves.placement, **given)
    steady = lower(plan, ends=ends_of(vocab), overlap=True).steady
    assert steady is not None
    assert steady.forward == steady.backward == (1, -1)
    config = small_model(style="llama", attention="gqa")
    step = pipeline_step(config, mesh="1x2x4", schedule=plan, num_sequences=64, overlap="on", bubbles="nan", **given)
    assert beyond(errors_of(answer_of(step), one_device(config, 64)), tolerance=TOLERANCE) == {}


def ends_of(vocab: Vocab) -> Ends:
    return "together" if vocab == "split" else "alone"


@settings(derandomize=True, deadline=None, max_examples=40)
@given(named_schedules(("1f1b", "interleaved-1f1b"), min_ranks=2, max_ranks=5, max_microbatches=24))
def test_every_pair_has_the_same_steps(schedule: Schedule) -> None:
    turns, steady = (tables := lower(schedule, overlap=True)).turns, tables.steady
    plain = lower(schedule)
    assert tables.num_turns == plain.num_turns
    assert plain.num_residual_slots <= tables.num_residual_slots <= plain.num_residual_slots + 1
    if steady is None:
        return
    ahead, back = range(steady.start, steady.stop, 2), range(steady.start + 1, steady.stop, 2)
    assert np.unique(turns.compute.kind[list(ahead)]) == FORWARD
    assert np.unique(turns.compute.kind[list(back)]) == BACKWARD
    for transfers, offsets in ((turns.forward, steady.forward), (turns.backward, steady.backward)):
        for offset, transfer in transfers.items():
            assert set(transfer.is_active[list(back)]) == {int(offset in offsets)}
            assert not transfer.is_active[list(ahead)].any()


@pytest.mark.parametrize("num_microbatches", [9, 12])
def test_1f1b_has_a_steady_state_from_the_first_full_tick_to_the_last(num_microbatches: int) -> None:
    sizes = {"num_ranks": 3, "num_microbatches": num_microbatches}
    steady = lower(build_schedule("1f1b", **sizes), overlap=True).steady
    assert steady is not None
    # All ranks have both from tick 2(p-1) to tick m-1; with the ends together the first and the last pair differ.
    assert (steady.stop - steady.start) // 2 == num_microbatches - 4
    together = build_schedule("1f1b", vocab="split", **sizes)
    steady = lower(together, ends="together", overlap=True).steady
    assert steady is not None
    assert steady.ends == "always"
    assert (steady.stop - steady.start) // 2 == num_microbatches - 4 - 1 - 2


@pytest.mark.parametrize("name", ["gpipe", "naive", "zb-h1", "v-half"])
def test_schedules_whose_ranks_do_different_things_have_none(name: str) -> None:
    schedule = build_schedule(name, num_ranks=2, num_microbatches=8, num_chunks=2 if name == "v-half" else 1)
    assert lower(schedule, overlap=True).steady is None


def test_forwards_of_a_pair_come_first_and_no_slot_is_freed_for_them() -> None:
    tables = lower(build_schedule("1f1b", num_ranks=2, num_microbatches=8), overlap=True)
    steady = tables.steady
    assert steady is not None
    slots = tables.turns.compute.residuals
    ahead, back = slots[steady.start : steady.stop : 2], slots[steady.start + 1 : steady.stop : 2]
    is_last = np.array([False, True])  # its backward is that of the same microbatch
    assert (ahead[:, ~is_last] != back[:, ~is_last]).all()
    assert (ahead[:, is_last] == back[:, is_last]).all()
    assert (ahead != NONE).all()


def test_no_message_of_the_steady_state_stands_in_a_branch() -> None:
    given = tiny_given("1x1x2") | {"schedule": build_schedule("1f1b", num_ranks=2, num_microbatches=8)}
    given["batch"] = jax.tree.map(lambda leaf: np.tile(leaf, (4, 1, 1)), given["batch"])

    def permutes(overlap: Overlap) -> list[bool]:
        """Return of every permute whether it stands in a branch."""
        run = lambda params: pipeline_grads(fns_of(), **given | {"params": params}, overlap=overlap)  # noqa: E731
        jaxpr = jax.make_jaxpr(run)(given["params"]).jaxpr
        inside = [
            id(eqn)
            for cond in nested_equations(jaxpr)
            if cond.primitive.name == "cond"
            for branch in cond.params["branches"]
            for eqn in nested_equations(branch.jaxpr)
        ]
        return [id(eqn) in inside for eqn in nested_equations(jaxpr) if eqn.primitive.name == "ppermute"]

    assert permutes("off") == [True, True]
    # The turns before and after, the steady state with both, and its last gradients.
    assert sorted(permutes("on")) == [False] * 3 + [True] * 4


def fns_of() -> Any:
    from trellax.pipeline import StageFns

    functions: dict[str, Any] = FNS
    return StageFns(**functions)


def test_longest_run() -> None:
    assert longest_run([False, True, True, False, True]) == range(1, 3)
    assert longest_run([]) == longest_run([False]) == range(0)
    assert longest_run([True] * 3) == range(3)


def test_options_of_the_compiler_leave_flags_of_the_user_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=None)
    mesh = abstract_mesh(MeshSpec(pipe=2)).update(abstract_device=gpu)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    (limit, most), (early, is_early) = compiler_options(mesh).items()
    assert most > 1
    assert is_early
    assert compiler_options(mesh, overlap="off") == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{limit}=2")
    assert compiler_options(mesh) == {early: True}
    alone = abstract_mesh(MeshSpec(data=2)).update(abstract_device=gpu)
    monkeypatch.setenv("XLA_FLAGS", "")
    assert compiler_options(alone) == {limit: 4}


def test_options_of_the_compiler_are_for_gpus_and_a_wrong_choice_is_refused() -> None:
    mesh, wrong = abstract_mesh(MeshSpec(pipe=2)), cast("Overlap", "yes")
    assert compiler_options(mesh) == compiler_options(mesh, overlap="on") == {}
    with pytest.raises(ScheduleError, match="'yes'"):
        compiler_options(mesh, overlap=wrong)
    with pytest.raises(ScheduleError, match="overlap"):
        tiny_grads({}, tiny_given("1x1x2") | {"overlap": wrong})
