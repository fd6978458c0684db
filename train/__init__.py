"""Training: from a TOML file to a run folder."""

from typing import TYPE_CHECKING

from ..meshes.lazy import make_lazy

if TYPE_CHECKING:
    from .batches import Batches
    from .check import check_run
    from .checkpoint import Checkpoints
    from .config import RunConfig, config_from_dict, load_config
    from .data import Corpus, load_corpus
    from .hf_config import HubModel, read_hub_model
    from .hf_read import read_weights
    from .hf_write import write_weights
    from .loop import prepare, train
    from .metrics import Summary
    from .optimizer import make_learning_rate, make_optimizer
    from .report import Report, describe, draw_schedule
    from .run_weights import load_params, saved_config
    from .serving_source import load_for_serving
    from .state import Setup, TrainState
    from .step import StepMetrics, make_eval_step, make_train_step
    from .tokenizer import ModelTokenizer, load_tokenizer

__all__ = [
    "Batches",
    "Checkpoints",
    "Corpus",
    "HubModel",
    "ModelTokenizer",
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
    "load_for_serving",
    "load_params",
    "load_tokenizer",
    "make_eval_step",
    "make_learning_rate",
    "make_optimizer",
    "make_train_step",
    "prepare",
    "read_hub_model",
    "read_weights",
    "saved_config",
    "train",
    "write_weights",
]

make_lazy(__name__)
