"""List objectives of a training layout: time, memory, device hours, energy. Read `training_search.py` next."""

from ..meshes.arguments import check_choice
from ..meshes.errors import PlanError
from .layout_pool import Cost
from .machines.topology import Topology

OBJECTIVES = ("train", "memory", "gpu-hours", "energy")
"""Objectives of training: tokens per second, memory of the fullest device, device time and energy per token."""


def find_cost(objective: str, topology: Topology) -> Cost:
    """Return the cost that an objective makes least; steps of one question have the same tokens.

    Raises:
        PlanError: the objective is unknown, or is energy and the watts of the accelerator are not stated.
    """
    check_choice("objective", objective, OBJECTIVES, error=PlanError)
    if objective == "memory":
        return lambda _time_s, num_bytes, _layout: num_bytes
    if objective == "train":
        return lambda time_s, _num_bytes, _layout: time_s
    if objective == "energy" and not topology.accelerator.watts:
        raise PlanError(
            f"the energy of {topology.name}: watts of {topology.accelerator.name} are not stated.",
            fix="write watts = 700, say, in a topology file, or ask for gpu-hours, which energy grows with.",
        )
    # All devices of one kind take the same watts, so that least energy is least device time.
    return lambda time_s, _num_bytes, layout: time_s * layout.num_devices
