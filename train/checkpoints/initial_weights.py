"""The weights that a run begins with: drawn, or those of `train.init_from`; and a run made of given weights.

Here a model's parameters are a tree {"embed", "blocks", "head"} as a `Transformer` has it, blocks [L, ...].
"""

from pathlib import Path
from typing import Any

from ...configs.run_config import RunConfig
from ...hub.config import model_differences
from ...hub.model_folder import load_params, read_model_config
from ...hub.read import open_weights
from ...hub.run_params import is_run_folder
from ...meshes import ConfigError
from ...meshes.processes.messages import text_of_first
from ..run_folder import Start
from ..state import Setup, TrainState
from .checkpoints import Checkpoints
from .layer_order import as_model, as_pipeline, params_in_layer_order, params_in_stages


def weight_shapes(setup: Setup) -> dict[str, Any]:
    """Return shapes, types and shardings of a run's parameters as `trellax.hub.load_params` takes them.

    A tree {"embed", "blocks", "head"} of float32, blocks [L@pipe, ...] where pipe divides the layers.
    """
    return as_model(params_in_layer_order(setup))


def save_params(folder: str | Path, params: dict[str, Any], config: RunConfig) -> None:
    """Save parameters as those of a run before its first step.

    Raises:
        CheckpointError: they cannot be saved.
    """
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save_params(params, config)


def check_initial_weights(setup: Setup, *, start: Start = "resume") -> None:
    """Raise unless `train.init_from` holds the weights of this run's model; reads nothing but headers.

    A run that resumes from a save does not ask for them.

    Raises:
        TrellaxError: there are none, or they are of another model, with every key that differs.
    """
    source, config = setup.config.train.init_from, setup.config
    # As at the start of a run: the first process's view counts, also where another has another folder by mistake.
    is_empty = text_of_first("empty" if Checkpoints(config.run_folder).folder.is_empty else "") if source else ""
    if not source or (start == "resume" and not is_empty):
        return
    model = read_model_config(source)
    if differing := model_differences(config.model, model):
        lines = [f"model.{name}={getattr(config.model, name)!r}, there {getattr(model, name)!r}" for name in differing]
        raise ConfigError(
            "\n  ".join([f"train.init_from={source!r} holds another model than this config has:", *lines]),
            fix="set these keys as they are there.",
        )
    if not is_run_folder(source):
        open_weights(source, weight_shapes(setup))


def initial_state(setup: Setup) -> TrainState:
    """Return the state before the first step: parameters drawn, or those of `train.init_from`; a fresh optimizer.

    Raises:
        TrellaxError: `train.init_from` holds no weights, or those of another model.
    """
    source = setup.config.train.init_from
    if not source:
        return setup.init_state()
    return setup.state_of(params_in_stages(setup, as_pipeline(load_params(source, weight_shapes(setup)))))
