"""Programs before they run: what a compiled step keeps, sends and computes on each device."""

from .hardware import Hardware, hardware_from_description, measure_host
from .inspect import ProgramReport, hlo_text, inspect_compiled
from .memory import Memory
from .minimum import StepSizes, minimum_bytes
from .picture import draw_report
from .tables import describe_report
from .targets import Machine, Target, list_gpus, open_target
from .testing import assert_fits, assert_sends_at_most, assert_sends_near_minimum
from .traffic import Traffic

__all__ = [
    "Hardware",
    "Machine",
    "Memory",
    "ProgramReport",
    "StepSizes",
    "Target",
    "Traffic",
    "assert_fits",
    "assert_sends_at_most",
    "assert_sends_near_minimum",
    "describe_report",
    "draw_report",
    "hardware_from_description",
    "hlo_text",
    "inspect_compiled",
    "list_gpus",
    "measure_host",
    "minimum_bytes",
    "open_target",
]
