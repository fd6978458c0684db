"""Pipeline parallelism: schedules as data, and one executor that runs them on any stage functions."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .executor.grads import compiler_options, pipeline_grads, pipeline_loss
    from .executor.loop_plan import Bubbles
    from .lowering.lower import lower
    from .lowering.tables import Tables
    from .model.balance import balance_layers, resolve_layers, stage_costs
    from .model.protocol import LayerInfo, Output
    from .model.split import PipelinedModel, split_transformer
    from .model.stack import check_layers, natural_order, stages_from_layers
    from .model.stage import LossAndGrads, PipelineParams, StageFns

__all__ = [
    "Bubbles",
    "LayerInfo",
    "LossAndGrads",
    "Output",
    "PipelineParams",
    "PipelinedModel",
    "StageFns",
    "Tables",
    "balance_layers",
    "check_layers",
    "compiler_options",
    "lower",
    "natural_order",
    "pipeline_grads",
    "pipeline_loss",
    "resolve_layers",
    "split_transformer",
    "stage_costs",
    "stages_from_layers",
]

make_lazy(__name__)
