"""Training: from a run configuration to a run folder."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .checkpoints.checkpoints import Checkpoints
    from .checkpoints.initial_weights import initial_state, weight_shapes
    from .data.batches import Batches
    from .data.corpus import Corpus, load_corpus
    from .loop import prepare, train
    from .metrics import Summary
    from .optimizer import make_learning_rate, make_optimizer
    from .report import Report, describe, draw_schedule
    from .state import Setup, TrainState
    from .step import StepMetrics, make_eval_step, make_train_step

__all__ = [
    "Batches",
    "Checkpoints",
    "Corpus",
    "Report",
    "Setup",
    "StepMetrics",
    "Summary",
    "TrainState",
    "describe",
    "draw_schedule",
    "initial_state",
    "load_corpus",
    "make_eval_step",
    "make_learning_rate",
    "make_optimizer",
    "make_train_step",
    "prepare",
    "train",
    "weight_shapes",
]

make_lazy(__name__)
