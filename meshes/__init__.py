"""Device meshes: sizes as data, devices in their place, and rules from logical dimensions to mesh axes."""

from typing import TYPE_CHECKING

from .lazy import make_lazy

if TYPE_CHECKING:
    from .build import abstract_mesh, build_mesh, mesh_sizes
    from .describe import ShardingRow, ShardingTable, sharding_table
    from .errors import (
        CheckpointError,
        ConfigError,
        DataError,
        LostProcessError,
        MeshError,
        ModelError,
        PlanError,
        ProgramError,
        RunError,
        ScheduleError,
        ServeError,
        ShardingError,
        TargetError,
        TrellaxError,
        WeightsError,
        suggest,
    )
    from .fake import use_fake_devices
    from .processes.agreement import Facts, describe_differences
    from .processes.join import coordination_client, join_processes, num_processes, process_index
    from .processes.launchers import Processes, find_processes
    from .rules import DEFAULT_RULES, ShardingRules
    from .spec import AXES, MeshSpec

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Facts",
    "LostProcessError",
    "MeshError",
    "MeshSpec",
    "ModelError",
    "PlanError",
    "Processes",
    "ProgramError",
    "RunError",
    "ScheduleError",
    "ServeError",
    "ShardingError",
    "ShardingRow",
    "ShardingRules",
    "ShardingTable",
    "TargetError",
    "TrellaxError",
    "WeightsError",
    "abstract_mesh",
    "build_mesh",
    "coordination_client",
    "describe_differences",
    "find_processes",
    "join_processes",
    "mesh_sizes",
    "num_processes",
    "process_index",
    "sharding_table",
    "suggest",
    "use_fake_devices",
]

make_lazy(__name__)
