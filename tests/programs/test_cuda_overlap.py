"""Messages of a pipeline's steady state travel beside products, in programs for GPUs that are not present."""

from pathlib import Path

import pytest
from trellax.programs.hlo import Computation, HloModule, Instruction, leaves
from trellax.programs.timeline.overlap import list_spans

from .test_cuda import inspect

pytestmark = pytest.mark.cuda

EIGHT_STAGES = "llama3-8b-8gpu h200:8 --mesh.tensor 1 --mesh.pipe 8 --pipeline.remat dots"


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (f"{EIGHT_STAGES} --pipeline.vocab ends", 1.0),
        (EIGHT_STAGES, 0.8),
        # Two permutes and four sums of one size, and two sums of numbers for a token, which `last` waits for.
        ("llama3-70b-64gpu h100:64/8", 0.99),
        pytest.param("llama3-70b-64gpu h100:64/8 --pipeline.vocab ends", 1.0, marks=pytest.mark.slow),
    ],
    ids=["8B-ends", "8B-split", "70B-split", "70B-ends"],
)
def test_messages_over_pipe_enclose_products(words: str, least: float, tmp_path: Path) -> None:
    """Of the bytes of permutes and sums over pipe in the steady state, those between whose halves a product starts."""
    inspect(words, hlo=str(tmp_path / "step.hlo"))
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    # Slices are gathered over tensor, in a node; sums over tensor are in the loops over layers.
    body, kinds = steady_body(program), ("collective-permute", "all-reduce")
    found = [span for computation, span in list_spans(program) if computation is body and span.kind in kinds]
    assert sum(span.kind == "collective-permute" for span in found) == 2
    hidden = sum(bytes_of(span.end or span.start) for span in found if span.products)
    assert hidden >= least * sum(bytes_of(span.end or span.start) for span in found)


def test_without_overlap_there_is_no_steady_state(tmp_path: Path) -> None:
    inspect(f"{EIGHT_STAGES} --pipeline.overlap off", hlo=str(tmp_path / "step.hlo"))
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    with pytest.raises(StopIteration):
        steady_body(program)


def steady_body(program: HloModule) -> Computation:
    """Return the loop body whose permutes stand in no branch."""
    bodies = {name for _, i in program.instructions() for name in i.called().get("body", ())}
    return next(
        computation
        for computation in program.computations.values()
        if computation.name in bodies and any(map(is_permute, computation.instructions.values()))
    )


def is_permute(instruction: Instruction) -> bool:
    is_kind = instruction.opcode in ("collective-permute", "collective-permute-start")
    return is_kind and "/exchange/ppermute" in instruction.op_name


def bytes_of(instruction: Instruction) -> int:
    return sum(leaf.num_bytes for leaf in leaves(instruction.type))


@pytest.mark.parametrize("schedule", ["zb-h1", "zb-v --pipeline.chunks 2"])
def test_actions_of_a_turn_run_side_by_side(schedule: str) -> None:
    """A message of a forward that XLA puts before the other actions makes ranks wait for each other in each turn."""
    step = inspect(f"{EIGHT_STAGES} --pipeline.schedule {schedule}")["step_time_s"]
    assert isinstance(step, dict)
    # Waiting was 46% and 40% of the modelled step, and is 20% and 18%: an input gradient takes longer than a weight's.
    assert step["waiting_s"] <= 0.25 * step["total_s"]
