"""The inspector: read memory, traffic and work per device from a compiled program."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .hardware import Hardware, hardware_from_description, measure_host
    from .memory import Memory
    from .report import ProgramReport, hlo_text, inspect_compiled
    from .report_picture import draw_report
    from .report_tables import format_report
    from .targets import Machine, Target, list_gpus, open_target
    from .testing import assert_fits, assert_sends_at_most, assert_sends_near_minimum, compilations
    from .traffic import Traffic

__all__ = [
    "Hardware",
    "Machine",
    "Memory",
    "ProgramReport",
    "Target",
    "Traffic",
    "assert_fits",
    "assert_sends_at_most",
    "assert_sends_near_minimum",
    "compilations",
    "draw_report",
    "format_report",
    "hardware_from_description",
    "hlo_text",
    "inspect_compiled",
    "list_gpus",
    "measure_host",
    "open_target",
]

make_lazy(__name__)
