"""Read the collectives of a compiled step, and what runs them, with the inspector's own reader."""

from dataclasses import dataclass

from trellax.programs.collectives import KINDS
from trellax.programs.groups import Groups, read_groups
from trellax.programs.hlo import HloModule, leaves


@dataclass(frozen=True)
class Collective:
    """One communication.

    is_in_loop, is_in_branch: whether a loop runs it, and a conditional.
    shapes: shapes of the arrays that it carries.
    groups: groups of devices.
    scope: names of the functions and scopes that it comes from.
    """

    kind: str
    is_in_loop: bool
    is_in_branch: bool
    shapes: tuple[tuple[int, ...], ...]
    groups: Groups
    scope: str

    @property
    def num_arrays(self) -> int:
        """How many arrays it carries."""
        return len(self.shapes)


def collectives_of(program: HloModule, *, num_devices: int = 8) -> list[Collective]:
    """Return the communications of a program."""
    inside, branches, found = program.in_loops(), _in_branches(program), []
    for computation, instruction in program.instructions():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            groups = read_groups(instruction, num_devices=num_devices)
            assert groups is not None
            found.append(
                Collective(
                    kind=kind,
                    is_in_loop=computation.name in inside,
                    is_in_branch=computation.name in branches,
                    shapes=tuple(array.dims for array in leaves(instruction.type)),
                    groups=groups,
                    scope=instruction.op_name,
                )
            )
    return found


def _in_branches(program: HloModule) -> set[str]:
    """Return the names of computations that a conditional runs, directly in a branch or through calls."""
    pending = [name for _, i in program.instructions() if i.opcode == "conditional" for name in i.branches]
    found: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            inner = program.computations[name].instructions.values()
            pending += [one for i in inner for names in i.called().values() for one in names]
    return found
