"""Read and write the section [mesh] of a run file: sizes by axis, and in [mesh.roles] the roles of names of one's own.

    [mesh]                  [mesh]
    data = 2                dp = 2
    tensor = 2              tp = 2
                            [mesh.roles]
                            dp = "batch"
                            tp = "tensor"

Each file is a `MeshSpec`. Without roles the keys are those of `DefaultMesh`, checked like those of any section.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetPydanticSchema
from pydantic_core import core_schema

from ..meshes import Axis, MeshError, MeshSpec
from ..meshes.axes import KNOWN_ROLES, RESERVED, ROLES, SEQUENCE
from ..meshes.errors import shown
from ..meshes.spec import SequenceParallel


@dataclass(frozen=True, kw_only=True)
class DefaultMesh:
    """The keys of [mesh] without roles, with the meaning of a `MeshSpec`'s."""

    data: int = 1
    tensor: int = 1
    pipe: int = 1
    expert: int = 1
    context: int = 1
    context_expert: int = 1
    sequence: SequenceParallel = "auto"


def read_mesh(values: Mapping[str, Any]) -> MeshSpec:
    """Return the mesh of a section that has roles.

    Raises:
        MeshError: an axis has no role, a role is unknown, or a size is not a size.
    """
    given = values[ROLES]
    if not isinstance(given, Mapping):
        raise MeshError(
            f"{ROLES}={shown(given)} is not a table.", fix=f'write [mesh.{ROLES}], and below it dp = "batch".'
        )
    roles = {**KNOWN_ROLES, **given}
    sizes = {name: size for name, size in values.items() if name not in RESERVED}
    sizes |= {name: 1 for name in given if name not in sizes}
    # A size without a role is not an axis, which `MeshSpec` says.
    axes: Any = {name: Axis(size, role=roles[name]) if name in roles else size for name, size in sizes.items()}
    return MeshSpec(axes=axes, sequence=values.get(SEQUENCE, "auto"))


def write_mesh(mesh: MeshSpec) -> dict[str, Any]:
    """Return the section of a mesh: its sizes, sequence, and the roles of axes with names of their own."""
    own = {name: axis.role for name, axis in mesh.axes if name not in KNOWN_ROLES}
    return {**mesh.sizes, SEQUENCE: mesh.sequence, **({ROLES: own} if own else {})}


def own_axes(section: Any, words: Iterable[str]) -> list[str]:
    """Return the names of axes that are not default ones in a section of a file or in the words of a command line."""
    table: Mapping[str, Any] = section if isinstance(section, Mapping) else {}
    roles = table.get(ROLES)
    named = [word.partition("=")[0].removeprefix(_OPTION) for word in words if word.startswith(_OPTION)]
    # Without a role a name is a mistake, which is told as that of any other unknown key.
    names = [*(roles if isinstance(roles, Mapping) else ()), *named]
    return [name for name in dict.fromkeys(names) if name not in KNOWN_ROLES]


def rename_axes(sizes: Mapping[str, int], section: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes by known name, of each of `KNOWN_ROLES`, as sizes of the axes of a section.

    Of several axes with one role the first has them all, and the others one device. An axis for experts or context that
    the section lacks is added if it has several devices.
    """
    roles = (read_mesh(section) if own_axes(section, ()) else MeshSpec()).roles
    found: dict[str, int] = {}
    for name, role in KNOWN_ROLES.items():
        first, *others = roles.having(role) or (name,)
        if first in roles.names or first in section or sizes[name] > 1:
            found |= {first: sizes[name]} | dict.fromkeys(others, 1)
    return found


_OPTION = f"--mesh.{ROLES}."


def _mesh_of(own: DefaultMesh) -> MeshSpec:
    """Return the mesh of these keys; without an axis for expert or context where that has one device."""
    sizes = {"expert": own.expert, "context": own.context, "context_expert": own.context_expert}
    axes = {name: Axis(size, KNOWN_ROLES[name]) for name, size in sizes.items() if size != 1}
    return MeshSpec(data=own.data, tensor=own.tensor, pipe=own.pipe, axes=axes, sequence=own.sequence)


def _schema(_: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
    def read(value: Any, check: Callable[[Any], Any]) -> MeshSpec:
        if isinstance(value, MeshSpec):
            return value
        if isinstance(value, Mapping) and ROLES in value:
            return read_mesh(value)
        own: DefaultMesh = check(value)
        return _mesh_of(own)

    return core_schema.no_info_wrap_validator_function(
        read,
        handler.generate_schema(DefaultMesh),
        serialization=core_schema.plain_serializer_function_ser_schema(write_mesh),
    )


MeshSection = Annotated[MeshSpec, GetPydanticSchema(_schema)]
"""The type of the section [mesh] of a `RunConfig`: a `MeshSpec`."""
