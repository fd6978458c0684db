"""The machine that this process runs on, as a topology. Read `topology.py` for what that is."""

import jax

from ...meshes.build import visible_devices
from ...meshes.errors import TargetError
from .topology import Accelerator, Topology, find_accelerator


def detect_topology() -> Topology | None:
    """Return the visible devices as a topology, None where they are CPUs or nothing the planner has figures of.

    Devices of one process share a node.
    """
    devices = visible_devices()
    accelerator = match_accelerator(devices[0].device_kind)
    if devices[0].platform == "cpu" or accelerator is None:
        return None
    return Topology(
        name=f"this machine: {len(devices)} x {devices[0].device_kind}",
        accelerator=accelerator,
        num_devices=len(devices),
        devices_per_node=min(len(devices), jax.local_device_count()),
    )


def match_accelerator(device_kind: str) -> Accelerator | None:
    """Return the known accelerator that jax calls by this name, the most specific; None if there is none.

    >>> match_accelerator("NVIDIA H200 141GB HBM3e").key
    'h200'
    """
    words = device_kind.removeprefix("NVIDIA ").replace("_", "-").split()
    for end in range(len(words), 0, -1):
        for name in ("-".join(words[:end]), " ".join(words[:end])):
            try:
                return find_accelerator(name)
            except TargetError:
                continue
    return None
