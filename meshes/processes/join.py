"""Join processes into one program: a rendezvous, then `jax.distributed`.

Process 0 hosts jax's coordinator, and afterwards `jax.devices()` lists those of all processes. Read `../build.py` next
for their positions in the mesh.
"""

import os
from typing import Any

import jax
from jax._src import distributed

from ..errors import MeshError
from .agreement import Facts
from .launchers import Processes
from .rendezvous import meet

_CONNECT_S = 60
"""Seconds for jax to connect processes after the rendezvous."""


def join_processes(processes: Processes, *, silence_s: int, start_s: float = 300, facts: Facts | None = None) -> None:
    """Connect this process to the others; call it before anything makes an array.

    Args:
        silence_s: seconds without a heartbeat after which jax gives up on a process.
        start_s: seconds to wait for the others to arrive.
        facts: settings that must be the same on all processes, compared before they connect.

    Raises:
        MeshError: the coordinator's port is taken, or jax cannot connect.
        RunError: the facts of some processes differ from those of process 0.
        LostProcessError: some processes did not arrive in time.
    """
    meet(processes, facts=facts or {}, start_s=start_s)
    # One GPU a process where several share a machine, unless the launcher has already given each its own.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    shares = processes.local_count > 1 and (not visible or "," in visible)
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.count,
            processes.index,
            local_device_ids=[processes.local_index] if shares else None,
            cluster_detection_method="deactivate",
            initialization_timeout=_CONNECT_S,
            heartbeat_timeout_seconds=silence_s,
            shutdown_timeout_seconds=silence_s,
        )
    except RuntimeError as error:
        raise MeshError(
            f"process {processes.index} of {processes.count} cannot join at {processes.coordinator}: "
            f"{str(error).splitlines()[0][:200]}",
            fix="start all processes, with the same --coordinator: a free port on the machine of process 0.",
        ) from None


def num_processes() -> int:
    """Return the number of joined processes, without starting a backend."""
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    """Return the index of this process, without starting a backend."""
    return distributed.global_state.process_id or 0


def coordination_client() -> Any:
    """Return the client of the coordinator's key-value store, or None in a single process; jax has no public name."""
    return distributed.global_state.client
