"""Roles of mesh axes: what a mesh axis is for, whatever its name.

    name      role       devices along it hold
    pipe      pipe       different layers
    data      batch      different sequences; gradients are summed over it
    tensor    tensor     different features of the same layers, and the same activations between layers

Code asks a role for its axes, `axes.pipe` or `axes.batch`, and names none itself. Read `spec.py` next.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from .arguments import check_choice
from .errors import MeshError

Role = Literal["pipe", "batch", "shard", "tensor", "context", "expert"]
"""The use of a mesh axis."""

_SPREAD: tuple[Role, ...] = ("batch", "shard", "context")
"""Roles along which devices hold different tokens, so that gradients are summed over them."""


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The role of each mesh axis, by the axis's name.

    >>> axes = MeshAxes.of(pp="pipe", dp="batch", tp="tensor")
    >>> axes.pipe, axes.batch
    ('pp', ('dp',))

    Raises:
        MeshError: a role is unknown, or not exactly one axis is the pipe.
    """

    roles: tuple[tuple[str, Role], ...]

    def __post_init__(self) -> None:
        for name, role in self.roles:
            check_choice(f"role of mesh axis {name!r}", role, get_args(Role), error=MeshError)
        pipes = [name for name, role in self.roles if role == "pipe"]
        if len(pipes) != 1:
            raise MeshError(
                f"{len(pipes)} of the axes {', '.join(name for name, _ in self.roles)} have the role pipe; a pipeline "
                "runs over one axis.",
                fix="give one axis the role pipe; of size 1 it costs nothing.",
            )

    @classmethod
    def of(cls, **roles: Role) -> "MeshAxes":
        """Return the axes with these roles, in this order."""
        return cls(roles=tuple(roles.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all axes."""
        return tuple(name for name, _ in self.roles)

    @property
    def pipe(self) -> str:
        """The axis whose devices hold different layers."""
        return self.having("pipe")[0]

    @property
    def batch(self) -> tuple[str, ...]:
        """The axes whose devices hold different tokens: gradients are summed over them."""
        return self.having(*_SPREAD)

    def having(self, *roles: Role) -> tuple[str, ...]:
        """Return the axes with one of these roles, in order."""
        return tuple(name for name, role in self.roles if role in roles)


DEFAULT_AXES = MeshAxes.of(pipe="pipe", data="batch", tensor="tensor")
"""The axes of `MeshSpec`: pipe, data and tensor."""
