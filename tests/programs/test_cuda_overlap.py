"""Messages of a pipeline's steady state travel beside products, in programs for GPUs that are not present."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from trellax.programs.collectives import KINDS
from trellax.programs.hlo import Computation, HloModule, Instruction, leaves

from .test_cuda import inspect, is_product, own

pytestmark = pytest.mark.cuda

EIGHT_STAGES = "llama3-8b-8gpu h200:8 --mesh.tensor 1 --mesh.pipe 8 --pipeline.remat dots"


@pytest.mark.parametrize(
    ("words", "least"),
    [
        (f"{EIGHT_STAGES} --pipeline.vocab ends", 1.0),
        (EIGHT_STAGES, 0.8),
        ("llama3-70b-64gpu h100:64/8", 0.8),
        pytest.param("llama3-70b-64gpu h100:64/8 --pipeline.vocab ends", 1.0, marks=pytest.mark.slow),
    ],
    ids=["8B-ends", "8B-split", "70B-split", "70B-ends"],
)
def test_messages_over_pipe_enclose_products(words: str, least: float, tmp_path: Path) -> None:
    """Of the bytes of permutes and sums over pipe in the steady state, those between whose halves a product starts."""
    inspect(words, hlo=str(tmp_path / "step.hlo"))
    program = HloModule.parse((tmp_path / "step.hlo").read_text())
    found = list(messages_of(program, steady_body(program)))
    assert sum(kind == "collective-permute" for kind, _, _ in found) == 2
    hidden = sum(num_bytes for _, num_bytes, is_hidden in found if is_hidden)
    assert hidden >= least * sum(num_bytes for _, num_bytes, _ in found)


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


def messages_of(program: HloModule, body: Computation) -> Iterator[tuple[str, int, bool]]:
    """Yield kind, bytes and whether a product starts before the end, of every permute and sum over pipe."""
    order = list(body.instructions.values())
    place = {instruction.name: index for index, instruction in enumerate(order)}
    for index, instruction in enumerate(order):
        kind = kind_of(program, instruction)
        # Slices are gathered over tensor, in a node; sums over tensor are in the loops over layers.
        if kind not in ("collective-permute", "all-reduce"):
            continue
        if instruction.opcode.endswith("-start"):
            done = next(
                i for i in order[index:] if i.opcode.endswith("-done") and i.operands[:1] == (instruction.name,)
            )
            between = order[index + 1 : place[done.name]]
            yield kind, bytes_of(done), any(has_product(program, i, body) for i in between)
        elif not instruction.opcode.endswith("-done"):
            yield kind, bytes_of(instruction), False


def kind_of(program: HloModule, instruction: Instruction) -> str | None:
    names = [instruction.opcode.removesuffix("-start")]
    if instruction.opcode == "async-start":
        names += [i.opcode for name in instruction.called().get("calls", ()) for i in own(program, name)]
    return next((name for name in names if name in KINDS), None)


def bytes_of(instruction: Instruction) -> int:
    return sum(leaf.num_bytes for leaf in leaves(instruction.type))


def has_product(program: HloModule, instruction: Instruction, body: Computation) -> bool:
    """Return whether an instruction is a product, or a loop or branch with one."""
    if is_product(program, instruction, body):
        return True
    called = [*instruction.called().get("body", ()), *instruction.branches] if instruction.opcode in NESTED else ()
    inside = [(program.computations[name], i) for name in called for i in own(program, name)]
    return any(has_product(program, i, computation) for computation, i in inside)


NESTED = ("while", "conditional")
