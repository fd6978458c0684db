"""Parse the HLO text of a compiled program into computations, instructions and their calls.

It reads the output of `compiled.as_text()` on CPU and GPU, of jax 0.10.2 to 0.12. Example:

    ENTRY %main (x: f32[4,8]) -> f32[4,8] {                                  a Computation, the entry
      %x = f32[4,8]{1,0} parameter(0)                                        an Instruction: name, type, opcode, payload
      ROOT %sum = f32[4,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add      ... and attributes
    }

This file knows the grammar only. Counts of executions are in `execution_counts.py`, traffic is in `collectives.py`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

# Element types whose number of bits is not in their name.
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_NAME = re.compile(r"%([\w.\-]+)")
# `ENTRY %main (x: f32[4,8]) -> f32[4,8] {`, without ENTRY for all others.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
# Between the types of a tuple: commas, white space, and comments such as `/*index=5*/`.
_SEPARATOR = re.compile(r"(?:,|\s|/\*[^*]*\*/)+")
# `f32[4,128]{1,0:T(8,128)}`: element type, dimensions, layout.
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
# `body=%region_0.1`, or several names in braces: `branch_computations={%a, %b}`.
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)"
    r"=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclass(frozen=True, slots=True)
class Array:
    """The type of an array, such as `f32[4,128]{1,0}`; `{1,0}` is its layout, here row-major.

    `{1,0:S(5)}` is in memory space 5, that of the host.
    """

    dtype: str
    dims: tuple[int, ...]
    is_row_major: bool = True
    is_on_host: bool = False

    @property
    def num_elements(self) -> int:
        """Product of the dimensions."""
        return math.prod(self.dims)

    @property
    def num_bytes(self) -> int:
        """Bytes without padding."""
        return -(-self.num_elements * bits_of(self.dtype) // 8)


Type = Array | tuple["Type", ...]
"""The type of a value: an array, or a tuple of types."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Instruction:
    """One line: `name = type opcode(operands), attributes`. `payload` is the text between the parentheses."""

    name: str
    type: Type
    opcode: str
    payload: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order."""
        return tuple(_NAME.findall(self.payload))

    @property
    def op_name(self) -> str:
        """The place in the user's program as jax names it: `jit(step)/while/body/dot_general`."""
        return self.text("op_name")

    @property
    def num_bytes(self) -> int:
        """Bytes of the result; of a tuple, the sum over its arrays."""
        return sum(leaf.num_bytes for leaf in leaves(self.type))

    def text(self, key: str) -> str:
        """Return the text of an attribute key="value", or an empty string."""
        found = re.search(rf'\b{key}="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    def numbers(self, key: str) -> tuple[int, ...]:
        """Return the numbers of an attribute key={1,2} or key=1; empty if there is none."""
        found = re.search(rf"\b{key}=(?:\{{([\d,\s-]*)\}}|(-?\d+))", self.attributes)
        return tuple(int(n) for n in re.findall(r"-?\d+", found[1] or found[2] or "")) if found else ()

    def called(self) -> dict[str, tuple[str, ...]]:
        """Return the names of called computations by attribute (`calls`, `body`, `to_apply`, ...)."""
        if "=" not in self.attributes:
            return {}
        return {
            key: tuple(re.findall(r"[\w.\-]+", several)) if several else (one,)
            for key, several, one in _CALLED.findall(self.attributes)
        }

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of a conditional; the first one is for true, or for index 0."""
        called = self.called()
        both = called.get("true_computation", ()) + called.get("false_computation", ())
        return both or called.get("branch_computations", ())

    @property
    def known_trip_count(self) -> int | None:
        """Number of iterations of a while loop, None if the compiler does not know it."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', self.attributes)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class Computation:
    """A named list of instructions in the order in which they are scheduled."""

    name: str
    instructions: Mapping[str, Instruction]

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in reversed(list(self.instructions.values())) if i.is_root)

    def operand_types(self, instruction: Instruction) -> tuple[Type, ...]:
        """Return the types of an instruction's operands."""
        return tuple(self.instructions[name].type for name in instruction.operands)

    def operand_bytes(self, instruction: Instruction) -> int:
        """Return the bytes of all operands of an instruction."""
        return sum(leaf.num_bytes for type_ in self.operand_types(instruction) for leaf in leaves(type_))


@dataclass(frozen=True, kw_only=True)
class HloModule:
    """A compiled HLO module: its computations by name, and its entry computation.

    >>> program = HloModule.parse(jax.jit(f).lower(x).compile().as_text())
    >>> program.num_instructions
    12
    """

    computations: Mapping[str, Computation]
    entry: Computation

    @classmethod
    def parse(cls, text: str) -> "HloModule":
        """Parse the text of a module.

        Raises:
            ValueError: a type in it is not written as HLO.
        """
        computations: dict[str, Computation] = {}
        own: dict[str, Instruction] = {}
        entry = ""
        types: dict[str, Type] = {}
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                # The computation keeps this dict, which the lines that follow fill.
                own = {}
                computations[head[2]] = Computation(name=head[2], instructions=own)
                entry = head[2] if head[1] else entry
            elif start := _INSTRUCTION.match(line):
                own[start[2]] = _read_instruction(line, start, types)
        return cls(computations=computations, entry=computations[entry])

    @property
    def num_instructions(self) -> int:
        """Number of instructions in all computations."""
        return sum(len(computation.instructions) for computation in self.computations.values())

    def in_loops(self) -> set[str]:
        """Return the names of computations that a loop runs, directly in its body or through calls."""
        called = {
            name: {one for i in computation.instructions.values() for names in i.called().values() for one in names}
            for name, computation in self.computations.items()
        }
        pending = [one for _, i in self.instructions() if i.opcode == "while" for one in i.called()["body"]]
        found: set[str] = set()
        while pending:
            name = pending.pop()
            if name not in found:
                found.add(name)
                pending += called[name]
        return found

    def instructions(self) -> Iterator[tuple[Computation, Instruction]]:
        """Yield every instruction with its computation."""
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                yield computation, instruction


def bits_of(dtype: str) -> int:
    """Return the bits of one element: 16 for bf16, 8 for pred."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0


def leaves(type_: Type) -> Iterator[Array]:
    """Yield the arrays of a type, those inside tuples included."""
    if isinstance(type_, Array):
        yield type_
    else:
        for part in type_:
            yield from leaves(part)


def parse_type(text: str) -> Type:
    """Parse a type written as `f32[4,128]{1,0}` or `(s32[], (f32[2]{0}))`.

    Raises:
        ValueError: the text is not a type.
    """
    return _read_type(text, 0)[0]


def _read_instruction(line: str, start: re.Match[str], types: dict[str, Type]) -> Instruction:
    """Parse one line; `types` has those parsed before, since the lines of a program share few types."""
    # `%sum = f32[4]{0} add(%x, %y), metadata={...}`: the type ends at a space, or at the parenthesis of a tuple.
    type_end = _end_of_type(line, start.end())
    type_text = line[start.end() : type_end]
    if type_text not in types:
        types[type_text] = parse_type(type_text)
    opening = line.index("(", type_end)
    closing = _end_of_parenthesis(line, opening)
    return Instruction(
        name=start[2],
        type=types[type_text],
        opcode=line[type_end + 1 : opening],
        payload=line[opening + 1 : closing - 1],
        attributes=line[closing:],
        is_root=bool(start[1]),
    )


def _end_of_type(line: str, start: int) -> int:
    return _end_of_parenthesis(line, start) if line[start] == "(" else line.index(" ", start)


def _end_of_parenthesis(line: str, opening: int) -> int:
    """Return the place after the parenthesis that closes the one at `opening`."""
    depth, place = 0, opening
    for found in re.finditer(r"[()]", line[opening:]):
        depth += 1 if found[0] == "(" else -1
        place = opening + found.end()
        if depth == 0:
            break
    return place


def _read_type(text: str, at: int) -> tuple[Type, int]:
    """Parse the type that begins at a place, and return it with the place after its end."""
    if text[at] != "(":
        found = _ARRAY.match(text, at)
        if found is None:
            raise ValueError(f"not an HLO type: {text[at : at + 40]!r}")
        # `f32[<=8]` has at most 8 elements at run time, and memory for 8.
        dims = tuple(int(n.lstrip("<=")) for n in found[2].split(",") if n)
        # The layout lists dimensions from the fastest to the slowest: {2,1,0} is row-major. Tiles follow after `:`.
        layout = [int(n) for n in (found[3] or "").partition(":")[0].split(",") if n]
        is_row_major, is_on_host = layout == sorted(layout, reverse=True), "S(5)" in (found[3] or "")
        return Array(found[1], dims, is_row_major, is_on_host), found.end()
    parts: list[Type] = []
    at += 1
    while text[at] != ")":
        if separator := _SEPARATOR.match(text, at):
            at = separator.end()
            continue
        part, at = _read_type(text, at)
        parts.append(part)
    return tuple(parts), at + 1
