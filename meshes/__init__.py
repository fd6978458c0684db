"""Device meshes: sizes as data, devices in their place, and rules from logical dimensions to mesh axes."""

from typing import TYPE_CHECKING

from .lazy import make_lazy

if TYPE_CHECKING:
    from .axes import MeshAxes
    from .build import abstract_mesh, build_mesh, mesh_sizes
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
    )
    from .fake import use_fake_devices
    from .rules import DEFAULT_RULES, ShardingRules
    from .sharding_table import sharding_table
    from .spec import Axis, MeshSpec

__all__ = [
    "DEFAULT_RULES",
    "Axis",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "LostProcessError",
    "MeshAxes",
    "MeshError",
    "MeshSpec",
    "ModelError",
    "PlanError",
    "ProgramError",
    "RunError",
    "ScheduleError",
    "ServeError",
    "ShardingError",
    "ShardingRules",
    "TargetError",
    "TrellaxError",
    "WeightsError",
    "abstract_mesh",
    "build_mesh",
    "mesh_sizes",
    "sharding_table",
    "use_fake_devices",
]

make_lazy(__name__)
