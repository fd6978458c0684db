"""Programs before they run: what a compiled step keeps, sends and computes on each device."""

from .hardware import Hardware, hardware_from_description, measure_host
from .inspect import ProgramReport, hlo_text, inspect_compiled
from .memory import Memory
from .minimum import StepSizes, minimum_bytes
from .traffic import Traffic

__all__ = [
    "Hardware",
    "Memory",
    "ProgramReport",
    "StepSizes",
    "Traffic",
    "hardware_from_description",
    "hlo_text",
    "inspect_compiled",
    "measure_host",
    "minimum_bytes",
]
