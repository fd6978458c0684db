"""Parameters in the order of the model, between run folders and whoever reads or writes them: import, export, training.

Here a model's parameters are a tree {"embed", "blocks", "head"} as a `Transformer` has it, blocks [L, ...].
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ...configs.run_config import RunConfig, config_from_dict
from ...hub.config import model_differences, read_hub_model
from ...hub.read import open_weights, read_weights
from ...hub.saves.names import FOLDER
from ...layers import ModelConfig
from ...meshes import CheckpointError, ConfigError
from ...meshes.processes.messages import is_first, text_of_first
from ...pipeline import PipelineParams
from ..run_folder import Start
from ..state import Setup, TrainState
from .natural import natural_params, params_from_natural
from .store import Checkpoints


def is_run_folder(folder: str | Path) -> bool:
    """Return whether a folder is one that `trellax train` or `import-hf` leaves."""
    return (Path(folder) / FOLDER).is_dir()


def weight_shapes(setup: Setup) -> dict[str, Any]:
    """Return shapes, types and shardings of a run's parameters in the order of the model."""
    return _as_model(natural_params(setup))


def load_params(folder: str | Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the newest parameters of a run folder, or those of a Hugging Face folder, each device reading its part.

    A damaged save is named on stderr, and the one before is used.

    Args:
        shapes: the parameters wanted, as `jax.ShapeDtypeStruct` with shardings; of `weight_shapes(setup)` for a run.

    Raises:
        CheckpointError: the run folder has none, or of another model.
        WeightsError: the Hugging Face folder is not whole, or of another model.
    """
    if not is_run_folder(folder):
        return read_weights(folder, shapes, say=_say)
    # Saved are the parameters of training: what a model computes in is made of them here.
    saved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), shapes)
    with Checkpoints(folder, keep=1, say=_say) as checkpoints:
        params = _as_model(checkpoints.restore_params(as_pipeline(saved)))
    return jax.tree.map(_cast, params, shapes)


def save_params(folder: str | Path, params: dict[str, Any], config: RunConfig) -> None:
    """Save parameters as those of a run before its first step."""
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save_params(as_pipeline(params), config)


def saved_config(folder: str | Path) -> RunConfig:
    """Return the config of the newest save of a run folder; keys that are not known are named on stderr.

    Raises:
        CheckpointError: it has none, or one of another model than this trellax knows.
    """
    if not is_run_folder(folder):
        raise CheckpointError(f"{folder} is no run folder: it has no {FOLDER}.", fix="name one that trellax wrote.")
    with Checkpoints(folder, keep=1) as checkpoints:
        return config_from_dict(checkpoints.saved_config(say=_say))


def model_of(folder: str | Path) -> ModelConfig:
    """Return the model whose weights a run folder or a Hugging Face folder holds.

    Raises:
        CheckpointError: the run folder has no save.
        WeightsError: the Hugging Face folder holds no model that trellax has.
    """
    return saved_config(folder).model if is_run_folder(folder) else read_hub_model(folder).config


def check_initial_weights(setup: Setup, *, start: Start = "resume") -> None:
    """Raise unless `train.init_from` holds the weights of this run's model; nothing but headers is read.

    A run that goes on from a save does not ask for them.

    Raises:
        TrellaxError: there are none, or they are of another model, with all that differs.
    """
    source, config = setup.config.train.init_from, setup.config
    # As in `Run`: what the first process sees counts, also where another one has another folder by mistake.
    is_empty = text_of_first("empty" if Checkpoints(config.run_folder).folder.is_empty else "") if source else ""
    if not source or (start == "resume" and not is_empty):
        return
    model = model_of(source)
    if differing := model_differences(config.model, model):
        lines = [f"model.{name}={getattr(config.model, name)!r}, there {getattr(model, name)!r}" for name in differing]
        raise ConfigError(
            "\n  ".join([f"train.init_from={source!r} holds another model than this config has:", *lines]),
            fix="set these keys as they are there.",
        )
    if not is_run_folder(source):
        open_weights(source, weight_shapes(setup))


def initial_state(setup: Setup) -> TrainState:
    """Return the state before the first step: parameters drawn, or those of `train.init_from`; a fresh optimizer."""
    source = setup.config.train.init_from
    if not source:
        return setup.init_state()
    return setup.state_of(params_from_natural(setup, as_pipeline(load_params(source, weight_shapes(setup)))))


def _say(text: str) -> None:
    if is_first():
        sys.stderr.write(f"{text}\n")


def _cast(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == wanted.dtype:
        return leaf
    cast = leaf.astype(wanted.dtype)
    # One by one, so that little is there twice.
    leaf.delete()
    return cast


def _as_model(params: PipelineParams) -> dict[str, Any]:
    return {"blocks": params.stages, **params.shared}


def as_pipeline(params: dict[str, Any]) -> PipelineParams:
    """Return the same parameters as a pipeline groups them, still in natural order."""
    return PipelineParams(stages=params["blocks"], shared={"embed": params["embed"], "head": params["head"]})
