"""A model placed on ranks in any way is the same model: loss, gradients and norm equal one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trellax.meshes import ScheduleError
from trellax.pipeline import StageFns, natural_order, pipeline_grads, stages_from_layers
from trellax.schedules import Action, Kind, Placement, Schedule, Vocab, schedule_from_orders

from .law import answer_of, beyond, errors_of, one_device, pipeline_step, small_model
from .tiny import FNS, tiny_given

TOLERANCE = 2e-5  # as in test_law.py, for the same reason

V = Placement.of("v", num_ranks=2, num_chunks=2)


def fill_and_drain(
    placement: Placement, num_microbatches: int, *, halves: bool = False, vocab: Vocab = "ends"
) -> Schedule:
    """All forwards stage by stage, then all backwards: an order that every placement can run."""
    orders = []
    for rank in range(placement.num_ranks):
        own = placement.stages_of(rank)
        kinds: tuple[Kind, ...] = ("I", "W") if halves else ("B",)
        words: list[tuple[int, Kind]] = [(stage, "F") for stage in own]
        words += [(stage, kind) for stage in reversed(own) for kind in kinds]
        every = range(num_microbatches)
        orders.append([Action(stage=stage, kind=kind, microbatch=k) for stage, kind in words for k in every])
    sizes = {"num_microbatches": num_microbatches, "num_chunks": placement.num_chunks}
    return schedule_from_orders(orders, name="fill-and-drain", placement=placement, vocab=vocab, **sizes)


def walk(*goes_down: bool, num_ranks: int) -> Placement:
    """Return the placement in which each chunk goes over all ranks, up or down."""
    ranks = range(num_ranks)
    return Placement(tuple(rank for down in goes_down for rank in (reversed(ranks) if down else ranks)))


@pytest.mark.parametrize(
    ("mesh", "placement", "layers", "vocab", "halves"),
    [
        ("2x2x2", V, None, "ends", False),
        ("2x1x2", V, (1, 4, 1, 2), "split", True),
        ("1x2x4", Placement.of("v", num_ranks=4, num_chunks=2), None, "split", False),
        ("1x1x2", walk(True, True, False, num_ranks=2), (1, 2, 1, 1, 1, 2), "ends", True),
        pytest.param("1x1x4", walk(True, False, num_ranks=4), None, "ends", False, marks=pytest.mark.slow),
        pytest.param("1x2x4", walk(False, False, num_ranks=4), None, "split", True, marks=pytest.mark.slow),
        pytest.param("2x1x4", walk(True, True, num_ranks=4), None, "ends", True, marks=pytest.mark.slow),
    ],
)
def test_any_placement_equals_one_device(
    mesh: str, placement: Placement, layers: tuple[int, ...] | None, vocab: Vocab, halves: bool
) -> None:
    config = small_model(style="llama", attention="gqa")
    plan = fill_and_drain(placement, 3, halves=halves, vocab=vocab)
    sizes = {"num_microbatches": 3, "num_sequences": 12, "num_chunks": placement.num_chunks}
    step = pipeline_step(config, mesh=mesh, schedule=plan, layers_per_stage=layers, vocab=vocab, bubbles="nan", **sizes)
    assert beyond(errors_of(answer_of(step), one_device(config, 12)), tolerance=TOLERANCE) == {}


@pytest.mark.parametrize("counts", [(2, 2, 2, 2), (1, 3, 2, 2)])
@pytest.mark.parametrize("placement", [V, walk(True, False, num_ranks=2), walk(True, True, num_ranks=2)])
def test_layers_return_to_their_order(placement: Placement, counts: tuple[int, ...]) -> None:
    layers = {"w": jnp.arange(8), "b": jnp.arange(16).reshape(8, 2)}
    cut = {"layers_per_stage": counts, "placement": placement}
    stages = stages_from_layers(layers, num_ranks=2, num_chunks=2, **cut)
    first = np.cumsum((0, *counts))
    for stage, count in enumerate(counts):
        own = stages["w"][placement.chunk_of(stage), placement.rank_of(stage)]
        assert own[:count].tolist() == list(range(first[stage], first[stage + 1]))
    assert jax.tree.map(np.array_equal, natural_order(stages, **cut), layers) == {"w": True, "b": True}


def test_a_model_cut_by_another_placement_is_refused() -> None:
    def cut_by(**placement: Any) -> StageFns:
        functions: dict[str, Any] = FNS | placement
        return StageFns(**functions)

    given = tiny_given("1x1x2") | {"schedule": fill_and_drain(V, 2)}
    with pytest.raises(ScheduleError, match=r"ranks \[0, 1, 1, 0\].*placement='loop'") as error:
        pipeline_grads(cut_by(), **given)
    assert "schedule.placement" in str(error.value)
    other = Placement.of("v", num_ranks=4, num_chunks=2)
    with pytest.raises(ScheduleError, match="4 ranks x 2 chunks, not 2 x 2"):
        pipeline_grads(cut_by(placement=other), **given)
    with pytest.raises(ScheduleError, match="'vee'"):
        pipeline_grads(cut_by(placement="vee"), **given)
