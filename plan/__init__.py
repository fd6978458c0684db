"""The planner: which layout to choose for a model and a machine, what it costs, and why."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .costs.inference_time import InferenceTime, inference_time
    from .costs.layouts import Layout
    from .costs.memory_model import MemoryUse, step_memory
    from .costs.minimum import StepSizes, minimum_bytes
    from .costs.step_time import StepTime, step_time
    from .diagnoses import Diagnosis, diagnose
    from .machines.detect import detect_topology
    from .machines.topology import Accelerator, Topology, read_topology
    from .plans import Plan
    from .search import TrainQuestion, price_layout, search_train
    from .serving_search import ServeQuestion, search_serving

__all__ = [
    "Accelerator",
    "Diagnosis",
    "InferenceTime",
    "Layout",
    "MemoryUse",
    "Plan",
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
]

make_lazy(__name__)
