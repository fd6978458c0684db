"""The sizes of a mesh as pure data, before any device is touched.

A run file gives a `MeshSpec`; `build_mesh` in `build.py` lays devices out by it. Read `build.py` next.
"""

import math
from dataclasses import dataclass, replace

from .errors import MeshError, shown, suggest
from .numbers import whole_number

MOST_FAKE_DEVICES = 4096
"""Most CPU devices that `use_fake_devices` starts: these take four seconds, four times as many a minute."""

_MOST_DEVICES = 1_000_000
"""Largest size of one axis; the largest machines have some 100,000 devices."""

AXES = ("pipe", "data", "tensor")
"""Mesh axes from the slowest links to the fastest: `tensor` varies fastest over neighbouring devices."""


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The number of devices along each axis of a mesh; at most one may be -1 and is inferred.

    >>> MeshSpec.parse("data=2,tensor=2,pipe=-1").resolve(num_devices=8)
    MeshSpec(data=2, tensor=2, pipe=2)

    Raises:
        MeshError: a size is zero or below -1, or more than one is -1.
    """

    data: int = 1
    tensor: int = 1
    pipe: int = 1

    def __post_init__(self) -> None:
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

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every axis by name, in reading order."""
        return {"data": self.data, "tensor": self.tensor, "pipe": self.pipe}

    @property
    def num_devices(self) -> int:
        """Number of devices of a resolved spec."""
        return math.prod(self.sizes.values())

    @classmethod
    def parse(cls, text: str) -> "MeshSpec":
        """Parse a spec such as `data=2,tensor=4,pipe=-1`; axes left out have size 1.

        Raises:
            MeshError: the text is not a list of `axis=size`, or names an unknown or repeated axis.
        """
        sizes: dict[str, int] = {}
        for part in (p.strip() for p in text.split(",") if p.strip()):
            axis, equals, size = (piece.strip() for piece in part.partition("="))
            if axis not in AXES:
                raise MeshError(f"unknown mesh axis {shown(axis)}; a mesh has data, tensor, pipe.{suggest(axis, AXES)}")
            if axis in sizes:
                raise MeshError(f"mesh axis {axis} is given twice in {shown(text)}.", fix=f"keep one {axis}=.")
            try:
                sizes[axis] = whole_number(size)
            except ValueError:
                got = f"{shown(size)} is not a whole number" if equals else "it has no size"
                raise MeshError(
                    f"mesh axis {axis} in {shown(text)}: {got}.", fix=f"write {axis}=2, for example."
                ) from None
        return cls(**sizes)

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
        return replace(self, **{open_axis: num_devices // given})

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
