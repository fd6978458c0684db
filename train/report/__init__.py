"""Reports of a run before its first step: mesh, shardings, stages, schedule, and the planner's warnings."""

from typing import TYPE_CHECKING

from ...meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .plan_warnings import warn_of_layout
    from .run_report import Report, describe_run, draw_schedule
    from .stage_table import StageTable, tabulate_stages

__all__ = ["Report", "StageTable", "describe_run", "draw_schedule", "tabulate_stages", "warn_of_layout"]

make_lazy(__name__)
