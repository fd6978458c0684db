"""Initialize a run: random weights or those of `train.init_from`; save given weights as a run before its first step.

Parameters of a model are a tree {"embed", "blocks", "head"} as in a `Transformer`, blocks [L, ...].
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.run_config import RunConfig
from ...hub.adapters import adapters_of, join_adapters, with_lengths, without_adapters, without_lora
from ...hub.cached_folder import find_model_folder
from ...hub.config import model_differences
from ...hub.frozen_kernels import FrozenKernels
from ...hub.model_folder import load_params, read_base, read_model_config
from ...hub.peft.read import is_peft_folder, open_adapters, read_adapters
from ...hub.read import open_weights
from ...hub.run_params import is_run_folder
from ...layers import Transformer
from ...layers.lora.check_config import lora_scale
from ...layers.lora.linears import adapted_names
from ...meshes import ConfigError
from ...meshes.processes.messages import text_of_first
from ..run_folder import Start
from ..state import Setup, TrainState
from .checkpoints import Checkpoints
from .layer_order import as_model, as_pipeline, params_in_layer_order, params_in_stages


def weight_shapes(setup: Setup) -> dict[str, Any]:
    """Return the shapes, dtypes and shardings of the parameters of a run, to pass to `trellax.hub.load_params`.

    A tree {"embed", "blocks", "head"} of float32; blocks are [L@pipe, ...] if pipe divides the layers.
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
    """Raise unless `train.init_from` holds weights of the same model; reads only headers.

    Nothing is checked for a run that resumes from a save, which does not read them.

    Raises:
        TrellaxError: there are no weights, or they are of another model; all keys that differ are listed.
    """
    source, config = setup.config.train.init_from, setup.config
    if config.model.lora_rank and not source:
        raise ConfigError(
            f"model.lora_rank={config.model.lora_rank} trains adapters of weights that stay as they are, and "
            "train.init_from does not say which.",
            fix="set train.init_from to a Hugging Face or run folder, or model.lora_rank=0.",
        )
    # Process 0 decides, as at the start of a run, even if another process sees another folder by mistake.
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
    folder = find_model_folder(source)
    if not is_run_folder(folder) and not is_peft_folder(folder):
        open_weights(folder, FrozenKernels(without_adapters(weight_shapes(setup))).plain)


def initial_state(setup: Setup) -> TrainState:
    """Return the state before the first step: random parameters or those of `train.init_from`, a new optimizer state.

    Raises:
        TrellaxError: `train.init_from` holds no weights, or those of another model.
    """
    source = setup.config.train.init_from
    if not source:
        return setup.init_state()
    shapes = weight_shapes(setup)
    if setup.config.model.lora_rank:
        params = join_adapters(read_base(source, shapes), _first_adapters(setup, shapes))
        params = params if is_peft_folder(find_model_folder(source)) else with_lengths(params)
    else:
        params = load_params(source, shapes)
    return setup.state_of(params_in_stages(setup, as_pipeline(params)))


def _first_adapters(setup: Setup, shapes: Any) -> Any:
    """Return the adapters of a folder of PEFT if the run starts with one, else fresh ones."""
    source, config = setup.config.train.init_from, setup.config.model
    folder = find_model_folder(source)
    if not is_peft_folder(folder):
        return _draw_adapters(setup, adapters_of(shapes))
    there, adapters = read_adapters(
        open_adapters(folder), without_lora(config), FrozenKernels(without_adapters(shapes)).plain
    )
    compared = {"rank": lambda m: m.lora_rank, "scale": lora_scale, "targets": adapted_names}
    for name, value in (compared | {"magnitude": lambda m: m.lora_magnitude}).items():
        if value(config) != value(there):
            raise ConfigError(
                f"train.init_from={source!r} has adapters of {name} {value(there)}, and this config {value(config)}.",
                fix=f"set model.lora_rank={there.lora_rank}, model.lora_alpha={there.lora_alpha:g}, "
                f"model.lora_targets={list(adapted_names(there))}, model.lora_magnitude={there.lora_magnitude!r}.",
            )
    return adapters


def _draw_adapters(setup: Setup, shapes: Any) -> Any:
    """Return fresh adapters in layer order, the same on every mesh: the model with them is the model without."""

    def draw(seed: jax.Array) -> Any:
        model = Transformer(setup.config.model, rngs=nnx.Rngs(params=jax.random.key(seed)))
        return adapters_of(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    with jax.transfer_guard("allow"):
        seed = jnp.uint32(setup.config.run.seed)
        return jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes))(seed)
