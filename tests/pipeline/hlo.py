"""Read the collectives of a compiled step, and whether a loop runs them, with the inspector's own reader."""

from dataclasses import dataclass

from trellax.programs.collectives import KINDS
from trellax.programs.groups import Groups, read_groups
from trellax.programs.hlo import HloModule, leaves


@dataclass(frozen=True)
class Collective:
    """One communication: kind, whether a loop runs it, how many arrays it carries, groups of devices."""

    kind: str
    is_in_loop: bool
    num_arrays: int
    groups: Groups


def collectives_of(program: HloModule, *, num_devices: int = 8) -> list[Collective]:
    """Return the communications of a program."""
    inside, found = program.in_loops(), []
    for computation, instruction in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            groups = read_groups(instruction, num_devices=num_devices)
            assert groups is not None
            found.append(Collective(kind, computation.name in inside, len(list(leaves(instruction.type))), groups))
    return found
