"""Roles of mesh axes: what a mesh axis is for, whatever its name.

    name            role            devices along it hold
    pipe            pipe            different layers
    data            batch           different sequences; gradients are summed over it
    expert          expert          different sequences, and different experts of the same layers
    context         context         different tokens of the same sequences; gradients are summed over it
    context_expert  context_expert  different tokens of the same sequences, and different experts of the same layers
    tensor          tensor          different features of the same layers, and the same activations between layers

These names have the role of their line. Other names are yours to give, with a role: dp and replica for batch.
Code asks a role for its axes, `axes.pipe` or `axes.batch`, and names none itself. Read `spec.py` next.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import MeshError, shown, suggest

Role = Literal["pipe", "batch", "shard", "tensor", "context", "expert", "context_expert"]
"""The use of a mesh axis."""

ROLE_ORDER: tuple[Role, ...] = ("pipe", "batch", "shard", "expert", "context", "context_expert", "tensor")
"""Roles from the slowest links to the fastest: devices along a tensor axis are neighbours."""

DEFAULT_ROLES: Mapping[str, Role] = {"data": "batch", "tensor": "tensor", "pipe": "pipe"}
"""The axes that every mesh has, as a mesh is written: data=2 tensor=2 pipe=2."""

KNOWN_ROLES: Mapping[str, Role] = {
    **DEFAULT_ROLES,
    "expert": "expert",
    "context": "context",
    "context_expert": "context_expert",
}
"""The names that need no role, since they have one."""

ROLES = "roles"
"""The key of a run file's [mesh] that holds the roles of its axes."""

SEQUENCE = "sequence"
"""The key of a run file's [mesh] for sequence parallelism."""

RESERVED = (ROLES, SEQUENCE)
"""Keys of [mesh] that are not sizes, so that no axis has such a name."""

_BATCH: tuple[Role, ...] = ("batch", "shard", "expert")
"""Roles along which devices hold different sequences."""

CONTEXT_ROLES: tuple[Role, ...] = ("context", "context_expert")
"""Roles along which devices hold different tokens of the same sequences."""

EXPERT_ROLES: tuple[Role, ...] = ("expert", "context_expert")
"""Roles along which devices hold different experts of the same layers, and different tokens."""

SUMMED_ROLES: tuple[Role, ...] = (*_BATCH, *CONTEXT_ROLES)
"""Roles along which devices hold different tokens, so that loss and gradients are summed over them."""

KEPT_ROLES: tuple[Role, ...] = ("batch", "shard", "context")
"""Roles along which devices hold the same experts and different tokens: gradients of experts are summed over them."""


@dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """The role of each mesh axis, by the axis's name.

    >>> axes = MeshAxes.of(pp="pipe", dp="batch", tp="tensor")
    >>> axes.pipe, axes.batch
    ('pp', ('dp',))

    Raises:
        MeshError: a name is not an identifier or is given twice, a role is unknown, or not exactly one axis is the
            pipe.
    """

    roles: tuple[tuple[str, Role], ...]

    def __post_init__(self) -> None:
        for index, (name, role) in enumerate(self.roles):
            _check_name(name, others=self.names[:index])
            if role not in ROLE_ORDER:
                raise MeshError(
                    f"mesh axis {name!r} has the unknown role {shown(role)}.{suggest(str(role), ROLE_ORDER)}",
                    fix=f"use one of {', '.join(ROLE_ORDER)}.",
                )
            own = KNOWN_ROLES.get(name, role)
            if role != own:
                raise MeshError(
                    f"mesh axis {name!r} has the role {role}, but this name is that of the role {own}.",
                    fix=f"give the axis another name, or the role {own}.",
                )
        pipes = [name for name, role in self.roles if role == "pipe"]
        if len(pipes) != 1:
            who = f"axes {' and '.join(pipes)} have" if pipes else f"none of the axes {', '.join(self.names)} has"
            raise MeshError(
                f"{who} the role pipe; a pipeline runs over one axis.",
                fix=f"give {' and '.join(pipes[1:])} another role."
                if pipes
                else "give one axis the role pipe; of size 1 it costs nothing.",
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
        """The axes whose devices hold different sequences: the batch is split over them."""
        return self.having(*_BATCH)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes whose devices hold different tokens: loss and gradients are summed over them."""
        return self.having(*SUMMED_ROLES)

    @property
    def context(self) -> tuple[str, ...]:
        """The axes whose devices hold different tokens of the same sequences."""
        return self.having(*CONTEXT_ROLES)

    @property
    def expert(self) -> tuple[str, ...]:
        """The axes whose devices hold different experts of the same layers."""
        return self.having(*EXPERT_ROLES)

    @property
    def kept(self) -> tuple[str, ...]:
        """The axes over which weights may be kept split, and gathered for use; gradients are summed over them too."""
        return self.having(*KEPT_ROLES)

    @property
    def tensor(self) -> tuple[str, ...]:
        """The axes whose devices hold different features of the same layers."""
        return self.having("tensor")

    @property
    def listed(self) -> str:
        """The names as a message lists them, the pipe last: data, tensor, pipe."""
        return ", ".join((*(name for name in self.names if name != self.pipe), self.pipe))

    def having(self, *roles: Role) -> tuple[str, ...]:
        """Return the axes with one of these roles, in order."""
        return tuple(name for name, role in self.roles if role in roles)


def _check_name(name: str, *, others: Iterable[str]) -> None:
    # A name is also a key of a run file, an option of the command line, and a keyword of `MeshSpec.of`.
    if not (isinstance(name, str) and name.isascii() and name.isidentifier()) or name in RESERVED:
        raise MeshError(f"mesh axis {shown(name)} cannot be a name.", fix="use letters, digits and _, such as dp.")
    if name in others:
        raise MeshError(f"mesh axis {name!r} is given twice.", fix="give each axis a name of its own.")


DEFAULT_AXES = MeshAxes.of(pipe="pipe", data="batch", tensor="tensor")
"""The axes of a `MeshSpec` without names of its own: pipe, data and tensor."""
