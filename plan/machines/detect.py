"""Detect the machine that this process runs on. Read `topology.py` for the value."""

import jax

from ...meshes.build import visible_devices
from ...meshes.errors import TargetError
from .topology import Accelerator, Topology, find_accelerator


def detect_topology() -> Topology | None:
    """Return the topology of the visible devices; None if they are CPUs or an unknown accelerator.

    The devices of one process are taken to share a node.
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
    """Return the most specific known accelerator for jax's name of a device; None if there is none.

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
