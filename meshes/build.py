"""Build a mesh: assign devices to positions along its axes, by their roles.

Tensor parallelism communicates most, so `tensor` runs over neighbouring devices (NVLink inside a node); pipeline stages
communicate least, so `pipe` is outermost and crosses nodes (Narayanan et al. 2021, section 3.2). With pipe=2, data=2
and tensor=2 on two nodes of four devices:

                   data 0     data 1
    pipe 0         0  1       2  3        node 0
    pipe 1         4  5       6  7        node 1
                   tensor     tensor

Axes of other names are laid out by their roles, in the order of `ROLE_ORDER`, the pipe outermost.

Read `rules.py` next.
"""

import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from .axes import DEFAULT_AXES, MeshAxes
from .errors import MeshError, shown, suggest
from .spec import Axis, MeshSpec, SequenceParallel


def build_mesh(spec: MeshSpec, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh with the axes of a spec over the visible devices, real or fake: (pipe, data, tensor) by default.

    Devices are ordered by slice, process and id before they are laid out, so a `tensor` group lies inside one node
    whenever its size divides the node's. Axes are Auto: the compiler inserts the collectives outside `shard_map`.

    >>> build_mesh(MeshSpec(data=-1)).axis_names
    ('pipe', 'data', 'tensor')

    Args:
        devices: the devices to use; all visible ones if left out.

    Raises:
        MeshError: the sizes do not multiply to the number of devices.
    """
    chosen = list(visible_devices() if devices is None else devices)
    resolved = spec.resolve(num_devices=len(chosen))
    chosen.sort(key=lambda d: (getattr(d, "slice_index", None) or 0, d.process_index, d.id))
    names = spec.roles.names
    return jax.make_mesh(_shape(resolved), names, axis_types=(AxisType.Auto,) * len(names), devices=chosen)


def visible_devices() -> list[jax.Device]:
    """Return all devices that jax sees; the first call starts its backend.

    Raises:
        MeshError: jax has no backend for the platform in JAX_PLATFORMS.
    """
    try:
        return jax.devices()
    # Where a platform is known and its plugin is not installed, jax fails an assertion.
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0] or "its plugin is not installed."
        raise MeshError(
            f"jax cannot start on JAX_PLATFORMS={shown(os.environ.get('JAX_PLATFORMS', ''))}: {why}",
            fix="unset JAX_PLATFORMS, set it to cpu, or install jax for that platform.",
        ) from None


def abstract_mesh(spec: MeshSpec) -> AbstractMesh:
    """Return the mesh of a resolved spec without devices, for shapes and shardings on absent machines.

    Raises:
        MeshError: the spec still has a size of -1.
    """
    if -1 in spec.sizes.values():
        raise MeshError(
            f"mesh {spec} leaves an axis open, and without devices none can be inferred.", fix="give it a size."
        )
    names = spec.roles.names
    return AbstractMesh(_shape(spec), names, axis_types=(AxisType.Auto,) * len(names))


def mesh_sizes(
    mesh: Mesh | AbstractMesh, *, axes: MeshAxes = DEFAULT_AXES, sequence: SequenceParallel = "auto"
) -> MeshSpec:
    """Return the spec a mesh was built from; axes that it lacks have size 1.

    Args:
        axes: roles of the axes, `spec.roles`: a mesh knows their names alone. A mesh whose names are all default ones
            needs none.
        sequence: that of the spec, which a mesh does not know.

    Raises:
        MeshError: an axis with several devices has no role.
    """
    axes = DEFAULT_AXES if set(mesh.axis_names) <= set(DEFAULT_AXES.names) else axes
    check_axes(mesh.shape, axes=axes)
    own = {name: Axis(mesh.shape.get(name, 1), role=role) for name, role in axes.roles}
    return MeshSpec(axes=own, sequence=sequence)


def check_axes(sizes: Mapping[str, int], *, axes: MeshAxes) -> None:
    """Raise unless every axis with several devices has a role: along any other, all work would be repeated.

    Raises:
        MeshError: with the axis, its size, and the axes that have a role.
    """
    for name, size in sizes.items():
        if size > 1 and name not in axes.names:
            raise MeshError(
                f"mesh axis {name}={size} has no role; the axes with one are {axes.listed}.{suggest(name, axes.names)}",
                fix="give the roles of its spec: axes=spec.roles, or rules=ShardingRules.of(spec.roles).",
            )


def _shape(spec: MeshSpec) -> tuple[int, ...]:
    return tuple(spec.sizes[name] for name in spec.roles.names)
