"""How processes become one program: they meet, then `jax.distributed` connects them.

Process 0 hosts jax's coordinator, and afterwards `jax.devices()` are those of all processes. Read `../build.py` for
which of them sits where.
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
"""For jax to connect processes that have all just come."""


def join_processes(processes: Processes, *, silence_s: int, start_s: float = 300, facts: Facts | None = None) -> None:
    """Connect this process to the others; before anything makes an array.

    Args:
        silence_s: seconds after which jax itself gives up on a process that says nothing.
        start_s: seconds to wait for the others to come.
        facts: what all processes must have in common, compared before they connect.

    Raises:
        MeshError: the coordinator's port is taken, or jax cannot connect.
        RunError: the processes have other facts than process 0.
        LostProcessError: some processes have not come in time.
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
    """Return how many processes have joined, without starting a backend."""
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    """Return which of them this process is, without starting a backend."""
    return distributed.global_state.process_id or 0


def coordination_client() -> Any:
    """Return the client of the coordinator's key-value store, None where nothing has joined; jax has no public name."""
    return distributed.global_state.client
