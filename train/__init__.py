"""Training: from a TOML file to a run folder."""

from .batches import Batches
from .check import check_run
from .checkpoint import Checkpoints
from .config import RunConfig, config_from_dict, load_config
from .data import Corpus, load_corpus
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
    "RunConfig",
    "Setup",
    "StepMetrics",
    "Summary",
    "TrainState",
    "check_run",
    "config_from_dict",
    "describe",
    "draw_schedule",
    "load_config",
    "load_corpus",
    "make_eval_step",
    "make_learning_rate",
    "make_optimizer",
    "make_train_step",
    "prepare",
    "train",
]
