"""Train a model from a run config into a run folder; restore and evaluate the state in a run folder."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .checkpoints.checkpoints import Checkpoints
    from .checkpoints.initial_weights import initial_state, weight_shapes
    from .data.batches import Batches
    from .data.corpus import Corpus, load_corpus
    from .evaluate import evaluate, evaluate_state
    from .loop import train
    from .metrics.summary import Summary
    from .perplexity.evaluate_files import FileLoss, evaluate_files
    from .prepare import prepare
    from .report.run_report import Report, describe_run, draw_schedule
    from .state import Setup, TrainState
    from .step import StepMetrics, make_eval_step, make_train_step
    from .update.optimizer import make_learning_rate, make_optimizer

__all__ = [
    "Batches",
    "Checkpoints",
    "Corpus",
    "FileLoss",
    "Report",
    "Setup",
    "StepMetrics",
    "Summary",
    "TrainState",
    "describe_run",
    "draw_schedule",
    "evaluate",
    "evaluate_files",
    "evaluate_state",
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
