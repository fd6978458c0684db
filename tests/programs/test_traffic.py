"""The traffic of a step: by hand for five meshes, against the minimum, and with an extra collective."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
import pytest
from trellax.commands.inspect_step import inspect_step, step_sizes
from trellax.pipeline import StageFns
from trellax.plan.costs.device_params import block_params, vocabulary_params
from trellax.plan.costs.minimum_traffic import minimum_bytes
from trellax.programs import ProgramReport, Traffic
from trellax.programs.traffic import EVERY_KIND
from trellax.schedules import Placement
from trellax.train import Setup

from .steps import SPLIT, collectives_of, compiled_step, report_of, setup_of

X = 8 * 32 * 32 * 4  # bytes of one microbatch's activation, over all data shards
LOSS = 8 * 32 * 4  # bytes of one number for each of its tokens
M = 4

WHOLE_TOKENS = "--mesh.sequence off"


def rows(report: ProgramReport) -> dict[str, Traffic]:
    return {row.axis: row for row in report.traffic if row.kind == EVERY_KIND}


def counted(mesh: str, axis: str, *, inside: str, extra: str = "") -> dict[int, int]:
    """Operand bytes -> runs on the device that has most, of the collectives inside or outside the loops."""
    found: dict[int, int] = {}
    for collective in collectives_of(compiled_step(mesh, extra), setup_of(mesh, extra).mesh):
        if collective.axis == axis and ("while" in collective.op_name) == (inside == "loop"):
            size = collective.operand_bytes
            found[size] = found.get(size, 0) + int(collective.count.max())
    return found


def test_tensor_traffic_of_a_pipeline_by_hand() -> None:
    # Two layers a rank, four times a microbatch; the embedding once (rank 0), dy of the head once and three sums of the
    # loss, of which XLA joins two (rank 1).
    x, loss = X // 2, LOSS // 2
    found = counted("2x2x2", "tensor", inside="loop", extra=WHOLE_TOKENS)
    assert found == {x: 2 * 4 * M + 2 * M, loss: M, 2 * loss: M}


def test_tensor_traffic_of_one_rank_by_hand() -> None:
    x, loss = X // 4, LOSS // 4
    found = counted("4x2x1", "tensor", inside="loop", extra=WHOLE_TOKENS)
    assert found == {x: 4 * 4 * M + 2 * M, loss: M, 2 * loss: M}


@pytest.mark.parametrize(
    ("mesh", "layers", "x", "loss"), [("2x2x2", 2, X // 2, LOSS // 2), ("4x2x1", 4, X // 4, LOSS // 4)]
)
def test_tensor_traffic_with_sequence_parallelism_by_hand(mesh: str, layers: int, x: int, loss: int) -> None:
    # A gather carries the tokens of a device, a scatter all of them. A layer gathers two inputs forward, and backward
    # these again and two gradients; it scatters two outputs and two gradients. The embedding scatters x and gathers dx,
    # the head gathers y and scatters dy. No sum of an activation is left.
    gathers, scatters = layers * 6 * M + 2 * M, layers * 4 * M + 2 * M
    assert counted(mesh, "tensor", inside="loop") == {x // 2: gathers, x: scatters, loss: M, 2 * loss: M}
    # Once a step, over data too: gradients of two norms with scale and bias, and of two biases, of each layer, and of
    # positions and the last norm, over pipe as well if there is one. Over tensor alone, numbers of the norm.
    whole, of_ends = 4 * layers * 6 * 32, 4 * (32 * 32 + 2 * 32)
    is_piped = mesh.endswith("2")
    assert counted(mesh, "data+tensor", inside="step") == {whole if is_piped else whole + of_ends: 1}
    assert counted(mesh, "pipe+data+tensor", inside="step") == ({of_ends: 1} if is_piped else {})
    assert sum(counted(mesh, "tensor", inside="step")) <= 4 * 32


@pytest.mark.parametrize(("mesh", "ranks", "x"), [("2x2x2", 2, X // 4), ("1x4x2", 2, X // 4), ("2x1x4", 4, X // 2)])
def test_pipe_traffic_by_hand(mesh: str, ranks: int, x: int) -> None:
    # A tensor rank sends its own tokens.
    # Every rank sends in every turn in which some rank does: p - 2 more each way than it has microbatches.
    assert counted(mesh, "pipe", inside="loop") == {x: 2 * (M + ranks - 2)}


@pytest.mark.parametrize(("mesh", "layers", "tensor"), [("2x2x2", 2, 2), ("2x1x4", 1, 1), ("2x2x1", 4, 2)])
def test_data_traffic_is_one_sum_of_the_gradients(mesh: str, layers: int, tensor: int) -> None:
    sizes = counted(mesh, "data", inside="step", extra=WHOLE_TOKENS)
    ((size, runs),) = sizes.items()
    params = report_of(mesh, WHOLE_TOKENS).memory.parameters
    model = setup_of(mesh).config.model
    table, whole = vocabulary_params(model, parts=tensor)
    vocabulary = 4 * (table + whole)
    is_piped = setup_of(mesh).mesh.shape["pipe"] > 1
    assert params == 4 * layers * block_params(model, tensor=tensor) + vocabulary
    # One rank sums the vocabulary's gradients, and the loss, along with the others.
    assert (size, runs) == (params - vocabulary if is_piped else params + 4, 1)


@pytest.mark.parametrize(
    ("mesh", "extra"),
    # On two ranks a sum over pipe sends what the mathematics needs; on more an all-reduce sends up to twice as much.
    [("2x2x2", SPLIT), ("1x4x2", SPLIT), ("2x2x2", ""), ("1x4x2", ""), ("2x2x1", ""), ("4x2x1", "")],
)
def test_the_step_sends_the_minimum(mesh: str, extra: str) -> None:
    extra = f"{extra} {WHOLE_TOKENS}"
    ratios = {axis: round(row.ratio, 2) for axis, row in rows(report_of(mesh, extra)).items() if row.ratio}
    assert set(ratios.values()) == {1.0}
    assert {"data", "tensor", "pipe"} & ratios.keys() == {a for a, n in setup_of(mesh).mesh.shape.items() if n > 1}
    assert [row for row in report_of(mesh, extra).traffic if row.axis == "unattributed"] == []


@pytest.mark.parametrize(("mesh", "extra"), [("2x2x2", SPLIT), ("1x4x2", ""), ("4x2x1", "")])
def test_sequence_parallelism_sends_more_over_tensor_alone_and_says_why(mesh: str, extra: str) -> None:
    report = report_of(mesh, extra)
    ratios = {axis: row.ratio for axis, row in rows(report).items() if row.ratio}
    # In a block ten gathers and scatters where eight are the least; the ends and the sums have no more.
    assert 1.15 < ratios.pop("tensor") <= 1.25
    assert {round(ratio, 2) for ratio in ratios.values()} == {1.0}
    assert [note for note in report.notes if note.startswith("tensor: with sequence parallelism")]


def test_pipe_traffic_of_a_split_vocabulary_by_hand() -> None:
    found: dict[int, int] = {}
    setup = setup_of("2x1x4", SPLIT)
    for collective in collectives_of(compiled_step("2x1x4", SPLIT), setup.mesh):
        if collective.axis == "pipe" and "while" in collective.op_name:
            found[collective.operand_bytes] = found.get(collective.operand_bytes, 0) + int(collective.count.max())
    x, loss = X // 2, LOSS // 2
    # Permutes as without; x of the embedding, y for the head, dx, dy of the head; three sums of the loss, of which XLA
    # joins two.
    assert found == {x: 2 * (M + 2) + 4 * M, loss: M, 2 * loss: M}


@pytest.mark.parametrize(
    ("config", "extra"),
    [("tiny-dense", ""), ("tiny-llama", ""), ("tiny-llama", "--model.bias qkv --model.qk_norm on")],
)
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_parameters_of_one_device_are_those_of_the_shardings(config: str, extra: str, tensor: int) -> None:
    setup = setup_of(f"1x{tensor}x1", extra, config)
    shapes = setup.model.params
    sizes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    total = sum(_product(size) for size in sizes)
    model = setup.config.model
    vocabulary = sum(vocabulary_params(model, parts=tensor))
    assert total == model.num_layers * block_params(model, tensor=tensor) + vocabulary


def plant(setup: Setup) -> Setup:
    """The same run, whose layers also sum their output over data."""
    planted = Setup(setup.config, setup.mesh)
    fns: Any = setup.model.fns

    def layer(params: Any, x: jax.Array, microbatch: Any) -> jax.Array:
        y = fns.layer(params, x, microbatch)
        return y + 1e-3 * jax.lax.stop_gradient(jax.lax.psum(y, "data"))

    own = StageFns(first=fns.first, layer=layer, last=fns.last)
    planted.__dict__["model"] = replace(setup.model, fns=own)
    return planted


def test_an_extra_all_reduce_in_the_loop_over_microbatches_is_found() -> None:
    before, after = (rows(report)["data"] for report in (report_of("2x1x2"), inspect_step(plant(setup_of("2x1x2")))))
    # Two layers a rank, for each of four microbatches; with two data shards an all-reduce sends its operand once.
    assert after.count == before.count + 2 * M
    assert after.bytes == before.bytes + 2 * M * X // 2
    assert before.ratio is not None
    assert before.minimum_bytes is not None
    assert after.ratio == pytest.approx(before.ratio + 2 * M * X / 2 / before.minimum_bytes)


def test_minimum_of_a_step_by_hand() -> None:
    sizes = step_sizes(setup_of("2x2x2"))
    x, loss = X // 2, LOSS // 2
    table, whole = 256 * 32 // 2, 32 * 32 + 2 * 32
    split = (12 * 32**2) // 2 + (3 * 32 + 128) // 2
    assert minimum_bytes(sizes) == {
        "data": 4 * 2 * split * 1.0,
        "tensor": 2 * 4 * M * x + M * x + 3 * M * loss,
        "pipe": M * x / 2,
        "pipe+data": 4 * table * 1.5,
        # Each device has other tokens: sums over four devices of two layers' norms and biases, over eight of the ends.
        "data+tensor": 4 * 2 * (2 * 2 * 32 + 2 * 32) * 1.5,
        "pipe+data+tensor": 4 * whole * 1.75,
    }


def test_minimum_of_interleaved_chunks_counts_every_boundary() -> None:
    placement = Placement.of("loop", num_ranks=4, num_chunks=2)
    sizes = replace(step_sizes(setup_of("2x1x4")), num_chunks=2, placement=placement, layers_per_stage=None)
    # A rank in the middle sends two chunks' activations on and two chunks' gradients back.
    assert minimum_bytes(sizes)["pipe"] == 4 * M * sizes.boundary


def test_a_vocabulary_over_pipe_moves_its_gradients_to_data_and_sends_slices_over_pipe() -> None:
    copied = step_sizes(setup_of("2x2x2", WHOLE_TOKENS))
    whole_step, split = minimum_bytes(copied), minimum_bytes(replace(copied, vocab="split"))
    table, whole = vocabulary_params(copied.model, parts=2)
    x, loss = X // 2, LOSS // 2
    assert split["data"] == whole_step["data"] + 4 * (whole + table / 2)
    assert "pipe+data" not in split
    # Halves of x, y, dy and dx over pipe; over tensor two sums and two gathers of halves; three numbers a token of 4.
    assert split["pipe"] == whole_step["pipe"] + 4 * M * x / 2
    assert split["tensor"] == 2 * 4 * M * x + M * (2 * x + 2 * x / 2)
    assert split["pipe+tensor"] == 3 * M * loss * 1.5


def _product(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
