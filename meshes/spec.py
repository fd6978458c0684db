"""The axes of a mesh as pure data, before any device is touched: the name, size and role of each.

A run file gives a `MeshSpec`; `build_mesh` in `build.py` lays devices out by it. Read `build.py` next.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

from .arguments import check_choice
from .axes import CONTEXT_ROLES, DEFAULT_AXES, DEFAULT_ROLES, KNOWN_ROLES, RESERVED, ROLE_ORDER, MeshAxes, Role
from .errors import MeshError, shown, suggest
from .numbers import whole_number

MOST_FAKE_DEVICES = 4096
"""Most CPU devices that `use_fake_devices` starts: these take four seconds, four times as many a minute."""

_MOST_DEVICES = 1_000_000
"""Largest size of one axis; the largest machines have some 100,000 devices."""

AXES = DEFAULT_AXES.names
"""The default mesh axes from the slowest links to the fastest: `tensor` varies fastest over neighbouring devices."""


SequenceParallel = Literal["auto", "on", "off"]
"""Whether activations between layers are split by tokens over the tensor axes; "auto" is on where they divide."""


Shard = Literal["none", "optimizer", "step", "chunk", "layer"]
"""What is split over data: nothing, the optimizer state, or weights too, gathered once a "step", once for each run of
actions of a "chunk", or by every "layer" in every action."""

SHARDS: tuple[Shard, ...] = get_args(Shard)

Offload = Literal["none", "optimizer", "residuals"]
"""What is kept in the memory of the host: nothing, moments of the optimizer, or residuals of microbatches that wait."""


class Axis(NamedTuple):
    """One axis of a mesh: its number of devices, -1 for what is left, and its role."""

    size: int
    role: Role


@dataclass(frozen=True, init=False, repr=False)
class MeshSpec:
    """The axes of a mesh by name, each with its size and role; at most one size may be -1 and is inferred.

    >>> MeshSpec.parse("data=2,tensor=2,pipe=-1").resolve(num_devices=8)
    MeshSpec(data=2, tensor=2, pipe=2)
    >>> str(MeshSpec.of(dp=Axis(4, role="batch"), tp=Axis(2, role="tensor")))
    'dp=4 tp=2 pipe=1'

    Every mesh has an axis for batch, tensor and pipe: that of the default name, with one device, if no other is given.

    Args:
        data, tensor, pipe: sizes of the axes with the default names.
        axes: axes with names of one's own, in place of these or beside them.
        sequence: sequence parallelism over the tensor axes (Korthikanti et al. 2022, section 4.2.2).

    Raises:
        MeshError: a size is zero or below -1, more than one is -1, names and roles are not those of `MeshAxes`, or
            `sequence` is not one of the choices.
    """

    axes: tuple[tuple[str, Axis], ...]
    sequence: SequenceParallel

    def __init__(
        self,
        *,
        data: int | None = None,
        tensor: int | None = None,
        pipe: int | None = None,
        axes: Mapping[str, Axis] | tuple[tuple[str, Axis], ...] = (),
        sequence: SequenceParallel = "auto",
    ) -> None:
        check_choice("sequence", sequence, get_args(SequenceParallel), error=MeshError)
        object.__setattr__(self, "sequence", sequence)
        sizes = {"data": data, "tensor": tensor, "pipe": pipe}
        own = {name: Axis(size, role=DEFAULT_ROLES[name]) for name, size in sizes.items() if size is not None}
        given = {name: _axis_of(name, axis) for name, axis in dict(axes).items()} | own
        object.__setattr__(self, "axes", tuple(_complete(given).items()))
        self._check_sizes()
        _ = self.roles  # checks itself

    @classmethod
    def of(cls, **axes: Axis) -> "MeshSpec":
        """Return the mesh of these axes; of two with one role, the first is the outer one."""
        return cls(axes=axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis by name, as a mesh is read: data, tensor, pipe."""
        return {name: axis.size for name, axis in self.axes}

    @property
    def roles(self) -> MeshAxes:
        """Role of every axis by name, in the order in which devices are laid out: the pipe first, tensor last."""
        ordered = sorted(self.axes, key=lambda pair: _place_of(pair[1].role))
        return MeshAxes(roles=tuple((name, axis.role) for name, axis in ordered))

    @property
    def data(self) -> int:
        """Number of parts that the batch is split into: devices along all batch axes together."""
        return math.prod(self.sizes[name] for name in self.roles.batch)

    @property
    def context(self) -> int:
        """Number of parts that the tokens of a sequence are split into: devices along all context axes together."""
        return math.prod(self.sizes[name] for name in self.roles.context)

    @property
    def tensor(self) -> int:
        """Number of parts that the features of a layer are split into: devices along all tensor axes together."""
        return math.prod(self.sizes[name] for name in self.roles.tensor)

    @property
    def expert(self) -> int:
        """Number of parts that experts are split into: devices along all expert axes together."""
        return math.prod(self.sizes[name] for name in self.roles.expert)

    @property
    def context_expert(self) -> int:
        """Number of context ranks among the devices that experts are split over: those of axes of both uses."""
        return math.prod(self.sizes[name] for name in self.roles.having("context_expert"))

    @property
    def pipe(self) -> int:
        """Number of pipeline ranks: devices along the pipe axis."""
        return self.sizes[self.roles.pipe]

    @property
    def num_devices(self) -> int:
        """Number of devices of a resolved spec."""
        return math.prod(self.sizes.values())

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """Parse a spec such as `data=2,tensor=4,pipe=-1`; axes left out have size 1.

        An axis with a name of its own is written with its role: `dp=2:batch,tp=4:tensor`.

        Raises:
            MeshError: the text is not a list of `axis=size`, or names an unknown or repeated axis.
        """
        axes: dict[str, Axis] = {}
        for part in (p.strip() for p in text.split(",") if p.strip()):
            name, equals, rest = (piece.strip() for piece in part.partition("="))
            size, colon, role = (piece.strip() for piece in rest.partition(":"))
            if not colon and name not in KNOWN_ROLES:
                raise _unknown_axis(name)
            if name in axes:
                raise MeshError(f"mesh axis {name} is given twice in {shown(text)}.", fix=f"keep one {name}=.")
            try:
                axes[name] = Axis(whole_number(size), role=cast("Role", role if colon else KNOWN_ROLES[name]))
            except ValueError:
                got = f"{shown(size)} is not a whole number" if equals else "it has no size"
                raise MeshError(
                    f"mesh axis {name} in {shown(text)}: {got}.", fix=f"write {name}=2, for example."
                ) from None
        return cls(axes=axes)

    def resize(self, **sizes: int) -> "MeshSpec":
        """Return the spec with other sizes of some of its axes.

        Raises:
            MeshError: it has no axis of that name.
        """
        for name in sizes:
            if name not in self.sizes:
                raise MeshError(f"mesh {self} has no axis {name!r}.{suggest(name, self.sizes)}")
        axes = {name: axis._replace(size=sizes.get(name, axis.size)) for name, axis in self.axes}
        return MeshSpec(axes=axes, sequence=self.sequence)

    def splits_tokens(self, num_tokens: int) -> bool:
        """Return whether activations of sequences of `num_tokens` are split by tokens over the tensor axes.

        Raises:
            MeshError: tokens do not split over the context axes, or `sequence` is "on" and they do not over tensor.
        """
        num_tokens = self.tokens_of_rank(num_tokens)
        divides = num_tokens % self.tensor == 0
        if self.sequence == "on" and not divides:
            which = " of a context rank" if self.context > 1 else ""
            raise MeshError(
                f'sequence="on" splits {num_tokens} tokens{which} over {self.label("tensor")}={self.tensor}, and they '
                "do not divide.",
                fix=f'use sequences of {self._tokens_that_split(num_tokens)} tokens, or sequence="off".',
            )
        return self.sequence != "off" and self.tensor > 1 and divides

    def tokens_of_rank(self, num_tokens: int) -> int:
        """Return how many tokens of each sequence a context rank has: two of 2 x context equal chunks.

        Raises:
            MeshError: the tokens of a sequence do not divide.
        """
        parts = 2 * self.context
        if self.context > 1 and num_tokens % parts:
            over = self.label(*CONTEXT_ROLES)
            raise MeshError(
                f"{over}={self.context} cuts a sequence into {parts} chunks, two for each rank, and "
                f"{num_tokens} tokens do not divide: {num_tokens} / {parts} = {num_tokens / parts:.2f}.",
                fix=f"use sequences of {num_tokens // parts * parts or parts} tokens.",
            )
        return num_tokens // self.context

    def _tokens_that_split(self, num_tokens: int) -> int:
        """Return the tokens of a sequence nearest below that split over context and tensor."""
        parts = math.lcm(self.tensor, 2 if self.context > 1 else 1)
        return self.context * (num_tokens // parts * parts or parts)

    def resolve(self, *, num_devices: int) -> "MeshSpec":
        """Return the spec with -1 inferred, checked to use exactly `num_devices` devices.

        Raises:
            MeshError: the product of the sizes is not, or cannot be made, `num_devices`.
        """
        given = math.prod(size for size in self.sizes.values() if size != -1)
        open_axis = next((axis for axis, size in self.sizes.items() if size == -1), None)
        equation = " x ".join(f"{axis} {size if size != -1 else '?'}" for axis, size in self.sizes.items())
        if open_axis is None:
            if given != num_devices:
                raise MeshError(
                    f"mesh {self} needs {equation} = {given} devices, but {num_devices} are visible.",
                    fix=self._fix(num_devices),
                )
            return self
        if num_devices % given:
            raise MeshError(
                f"mesh {self} leaves {open_axis} open, but {num_devices} devices are not a multiple of the {given} "
                f"that the other axes take: {equation} = {num_devices}.",
                fix=f"choose sizes whose product divides {num_devices}.",
            )
        return self.resize(**{open_axis: num_devices // given})

    def label(self, *roles: Role) -> str:
        """Return the axes of these roles with several devices, as reports of traffic name them: `pipe+data`.

        If there is none, it is the name of the last of the axes.
        """
        names = self.roles.having(*roles)
        return "+".join(name for name in names if self.sizes[name] > 1) or names[-1]

    def _check_sizes(self) -> None:
        for axis, size in self.sizes.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise MeshError(
                    f"mesh axis {axis}={size!r} is not a whole number.", fix=f"write {axis}=2, for example."
                )
            if size < 1 and size != -1:
                raise MeshError(
                    f"mesh axis {axis}={size} has no devices; a size is 1 or more, or -1 for what is left.",
                    fix=f"set {axis}=1 to leave the axis out.",
                )
            if size > _MOST_DEVICES:
                raise MeshError(
                    f"mesh axis {axis}={shown(size)} is larger than any machine; {_MOST_DEVICES} is the most.",
                    fix=f"set {axis} to the devices that you have.",
                )
        open_axes = [axis for axis, size in self.sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise MeshError(
                f"mesh {self} leaves {' and '.join(open_axes)} open, and only one axis can be inferred.",
                fix=f"give {open_axes[0]} a size.",
            )

    def _fix(self, num_devices: int) -> str:
        fits = self.num_devices <= MOST_FAKE_DEVICES
        other = f", or run with --fake-devices {self.num_devices}." if fits else "."
        for axis, size in self.sizes.items():
            rest = self.num_devices // size
            if num_devices % rest == 0:
                return f"set {axis}={num_devices // rest}{other}"
        return f"choose sizes whose product is {num_devices}{other}"

    def __str__(self) -> str:
        return " ".join(f"{axis}={size}" for axis, size in self.sizes.items())

    def __repr__(self) -> str:
        own = "" if self.sequence == "auto" else f", sequence={self.sequence!r}"
        if set(self.sizes) == set(DEFAULT_AXES.names):
            return f"MeshSpec({', '.join(f'{axis}={size}' for axis, size in self.sizes.items())}{own})"
        return f"MeshSpec(axes={dict(self.axes)}{own})"


def _axis_of(name: str, axis: Any) -> Axis:
    """Return the axis, which may also be a plain pair of size and role.

    Raises:
        MeshError: it is a size without a role.
    """
    if isinstance(axis, tuple) and len(axis) == 2:
        return Axis(*axis)
    raise MeshError(
        f"mesh axis {name}={shown(axis)} has no role.",
        fix=f'write {name}=Axis(2, role="batch"), or in a run file {name} = "batch" under [mesh.roles]; roles are '
        f"{', '.join(ROLE_ORDER)}.",
    )


def _complete(given: dict[str, Axis]) -> dict[str, Axis]:
    """Return the axes with those of the default names added, of size 1, for roles that no axis has."""
    taken = {axis.role for axis in given.values()}
    missing = {name: Axis(1, role) for name, role in DEFAULT_AXES.roles if role not in taken}
    # A mesh reads data, tensor, pipe, and its devices lie as pipe, data, tensor.
    return dict(sorted((missing | given).items(), key=lambda pair: (pair[1].role == "pipe", _place_of(pair[1].role))))


def _place_of(role: str) -> int:
    # An unknown role is an error of `MeshAxes`, which says so.
    return ROLE_ORDER.index(role) if role in ROLE_ORDER else len(ROLE_ORDER)


def _unknown_axis(name: str) -> MeshError:
    """Return the error for a name without a role: it is mistyped, or its role is missing."""
    if name in RESERVED:
        return MeshError(
            f"{shown(name)} is a key of [mesh] in a run file, not an axis; a mesh has data, tensor, pipe.",
            fix=f"write it there, or on the command line as --mesh.{name}.",
        )
    hint = suggest(name, KNOWN_ROLES)
    is_name = name.isidentifier() and not hint
    fix = f"a name of your own has its role beside it: {name}=2:batch, for example." if is_name else None
    return MeshError(f"unknown mesh axis {shown(name)}; a mesh has data, tensor, pipe.{hint}", fix=fix)
