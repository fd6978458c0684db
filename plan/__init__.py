"""Programs before they run: which layout to choose and why, and what a compiled step keeps, sends and computes."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .detect import detect_topology
    from .diagnoses import Diagnosis, diagnose
    from .hardware import Hardware, hardware_from_description, measure_host
    from .inference_time import InferenceTime, inference_time
    from .inspect import ProgramReport, hlo_text, inspect_compiled
    from .layouts import Layout
    from .memory import Memory
    from .memory_model import MemoryUse, step_memory
    from .minimum import StepSizes, minimum_bytes
    from .picture import draw_report
    from .plans import Plan
    from .search import TrainQuestion, price_layout, search_train
    from .serving_search import ServeQuestion, search_serving
    from .step_time import StepTime, step_time
    from .tables import describe_report
    from .targets import Machine, Target, list_gpus, open_target
    from .testing import assert_fits, assert_sends_at_most, assert_sends_near_minimum, compilations
    from .topology import Accelerator, Topology, read_topology
    from .traffic import Traffic

__all__ = [
    "Accelerator",
    "Diagnosis",
    "Hardware",
    "InferenceTime",
    "Layout",
    "Machine",
    "Memory",
    "MemoryUse",
    "Plan",
    "ProgramReport",
    "ServeQuestion",
    "StepSizes",
    "StepTime",
    "Target",
    "Topology",
    "Traffic",
    "TrainQuestion",
    "assert_fits",
    "assert_sends_at_most",
    "assert_sends_near_minimum",
    "compilations",
    "describe_report",
    "detect_topology",
    "diagnose",
    "draw_report",
    "hardware_from_description",
    "hlo_text",
    "inference_time",
    "inspect_compiled",
    "list_gpus",
    "measure_host",
    "minimum_bytes",
    "open_target",
    "price_layout",
    "read_topology",
    "search_serving",
    "search_train",
    "step_memory",
    "step_time",
]

make_lazy(__name__)
