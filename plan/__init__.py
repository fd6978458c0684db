"""Plan a layout for a model and a machine: search, predicted time and memory, and diagnoses.

Read `training_search.py` first; `costs/` has the cost and memory model, `machines/` the accelerators and their links.
"""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .costs.inference_time import InferenceTime, inference_time
    from .costs.layout import Layout
    from .costs.memory_model import MemoryUse, step_memory
    from .costs.minimum_traffic import StepSizes, minimum_bytes
    from .costs.runtime import Runtime, trellax_runtime
    from .costs.step_time import StepTime, step_time
    from .diagnoses import Diagnosis, diagnose
    from .machines.detect import detect_topology
    from .machines.topology import Accelerator, Topology, read_topology
    from .plan import Plan
    from .serving_search import ServeQuestion, search_serving
    from .training_search import TrainQuestion, price_layout, search_train

__all__ = [
    "Accelerator",
    "Diagnosis",
    "InferenceTime",
    "Layout",
    "MemoryUse",
    "Plan",
    "Runtime",
    "ServeQuestion",
    "StepSizes",
    "StepTime",
    "Topology",
    "TrainQuestion",
    "detect_topology",
    "diagnose",
    "inference_time",
    "minimum_bytes",
    "price_layout",
    "read_topology",
    "search_serving",
    "search_train",
    "step_memory",
    "step_time",
    "trellax_runtime",
]

make_lazy(__name__)
