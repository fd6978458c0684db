"""Read the parameters in a save of a run as a tree {"embed", "blocks", "head"}, blocks [L, ...].

A save holds the whole training state. The parameters are the arrays under `params.`, in layer order on every mesh:

    blocks.mlp.up.kernel [L, ...]  <->  params.stages.mlp.up.kernel
    embed.table                    <->  params.shared.embed.table

A run with `train.ema` has an average of them beside, under `opt_state.2.average.`

`train/checkpoints/` writes them; read `model_folder.py` next.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from ..layers import ModelConfig
from ..meshes import CheckpointError
from ..meshes.arguments import check_choice
from ..meshes.processes.messages import is_first
from .adapters import adapter_shapes, adapters_of, join_adapters, merge_adapters, without_adapters
from .cached_folder import find_model_folder
from .frozen_kernels import FrozenKernels, RoundedKernels
from .peft.read import base_of
from .read import read_weights
from .saved_model import read_saved_model
from .saves.names import FOLDER, SaveFolder
from .saves.paths import leaves_by_path, path_text
from .saves.reader import Arrays, SaveReader, Shapes
from .saves.seal import AVERAGE, PARAMS, Seal

Weights = Literal["last", "ema"]
"""Which weights of a run: those after its last step, or their average (`train.ema`)."""

_PREFIXES: dict[Weights, str] = {"last": PARAMS, "ema": AVERAGE}
_SHOWN = 5


def check_weights(weights: Weights) -> None:
    """Raise unless this is a choice of weights.

    Raises:
        CheckpointError: it is not.
    """
    check_choice("weights", weights, get_args(Weights), error=CheckpointError)


def is_run_folder(folder: str | Path) -> bool:
    """Return whether a folder is one that `trellax train` or `import-hf` writes."""
    return (Path(folder) / FOLDER).is_dir()


def run_saves(folder: str | Path) -> SaveFolder:
    """Return the saves of a run folder.

    Raises:
        CheckpointError: the folder is not a run folder.
    """
    if not is_run_folder(folder):
        raise CheckpointError(f"{folder} is no run folder: it has no {FOLDER}.", fix="name one that trellax wrote.")
    return SaveFolder((Path(folder) / FOLDER).absolute())


def read_run_params(folder: str | Path, shapes: dict[str, Any], *, weights: Weights = "last") -> dict[str, Any]:
    """Return the parameters of the newest whole save, each device reading its part; changes nothing on the disk.

    Args:
        shapes: a tree of `jax.ShapeDtypeStruct` with shardings. A save holds float32, which is converted to its types.

    Of a run that trained adapters, whose saves hold those alone, the other weights are read from its `train.init_from`;
    adapters are merged unless `shapes` has them.

    Raises:
        CheckpointError: there is no whole save, it is of another model, or it has no average of the weights.
    """
    return read_chosen_params(folder, lambda _seal: shapes, weights=weights)


def read_chosen_params(
    folder: str | Path, choose_shapes: Callable[[Seal], dict[str, Any]], *, weights: Weights = "last"
) -> dict[str, Any]:
    """Return the same for shapes that depend on the save, whose files are hashed once.

    Args:
        choose_shapes: called with the seal of a save before its arrays are read; returns shapes as `read_run_params`
            takes them, or raises to refuse the save.

    Raises:
        CheckpointError: there is no whole save, it is of another model, or it has no average of the weights.
    """
    check_weights(weights)
    saves = run_saves(folder)
    chosen: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def choose(seal: Seal) -> Shapes:
        asked = choose_shapes(seal)
        model = _saved_lora(seal, folder=saves / seal.step)
        own = asked if model is None else adapters_of(asked) or adapter_shapes(model, asked)
        chosen.append((asked, own))
        return _choose_weights(seal, jax.tree.map(_as_saved, own), folder=saves / seal.step, weights=weights)

    seal, arrays = SaveReader(folder=saves, say=say_on_stderr).read(choose)
    # A save whose arrays were found to be damaged was chosen before it; the last one is the save that was read.
    asked, own = chosen[-1]
    params = jax.tree.map(_convert, params_from_arrays(arrays, like=own, weights=weights), own)
    model = _saved_lora(seal, folder=saves / seal.step)
    return params if model is None else _with_base(params, asked, model, seal, folder=saves / seal.step)


def read_adapters(
    folder: str | Path, choose_shapes: Callable[[Seal], dict[str, Any]], *, weights: Weights = "last"
) -> dict[str, Any]:
    """Return the adapters of the newest whole save of a run that trained them, without the weights they adapt.

    Args:
        choose_shapes: returns the shapes of the adapters, a tree {"blocks": ...}.

    Raises:
        CheckpointError: there is no whole save, or it is of another model.
    """
    saves, chosen = run_saves(folder), list[dict[str, Any]]()

    def choose(seal: Seal) -> Shapes:
        chosen.append(choose_shapes(seal))
        return _choose_weights(seal, chosen[-1], folder=saves / seal.step, weights=weights)

    _, arrays = SaveReader(folder=saves, say=say_on_stderr).read(choose)
    return params_from_arrays(arrays, like=chosen[-1], weights=weights)


def _choose_weights(seal: Seal, shapes: dict[str, Any], *, folder: Path, weights: Weights) -> Shapes:
    """Return the shapes of a model by the paths of the arrays to read."""
    within = _PREFIXES[weights]
    if weights == "ema" and not any(path.startswith(within) for path in seal.arrays):
        raise CheckpointError(
            f"{folder} holds no average of the weights: train.ema was 0.",
            fix="ask for the weights of the last step, or train with --train.ema 0.999.",
        )
    wanted = arrays_from_params(shapes, weights=weights)
    require_same_arrays(seal, wanted, folder=folder, within=within)
    return wanted


def _saved_lora(seal: Seal, *, folder: Path) -> ModelConfig | None:
    """Return the model of a save that holds adapters alone, None for one that holds all weights."""
    return read_saved_model(seal, folder=folder) if seal.config.get("model", {}).get("lora_rank") else None


def _with_base(
    adapters: dict[str, Any], asked: dict[str, Any], model: ModelConfig, seal: Seal, *, folder: Path
) -> dict[str, Any]:
    """Return the weights that adapters belong to, from `train.init_from`: with them beside, or merged if not asked for.

    Raises:
        CheckpointError: those weights are not there.
    """
    source = seal.config.get("train", {}).get("init_from")
    if not isinstance(source, str) or not source or not find_model_folder(source).is_dir():
        raise CheckpointError(
            f"{folder} holds adapters of the weights in train.init_from={source!r}, and there is no such folder here.",
            fix="run the command where the run was started, or bring the folder back.",
        )
    source, shapes = base_of(find_model_folder(source)), without_adapters(asked)
    if adapters_of(asked):
        frozen = FrozenKernels(shapes)
        return join_adapters(frozen.unpack(_read_kernels(source, frozen)), adapters)
    return merge_adapters(_read_kernels(source, RoundedKernels(shapes, model)), adapters, config=model)


def _read_kernels(source: Path, kernels: FrozenKernels | RoundedKernels) -> dict[str, Any]:
    """Return the weights of a folder of either kind, with kernels held as they are to be."""
    if not is_run_folder(source):
        return read_weights(source, kernels.plain, say=say_on_stderr, each=kernels.hold)
    plain = read_run_params(source, kernels.plain)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: kernels.hold(path_text(path), leaf), plain)


def arrays_from_params(params: dict[str, Any], *, weights: Weights = "last") -> dict[str, Any]:
    """Return the leaves of a model's parameters by the paths under which a run saves them."""
    return {_saved_path(path, weights): leaf for path, leaf in leaves_by_path(params).items()}


def params_from_arrays(arrays: Arrays, *, like: dict[str, Any], weights: Weights = "last") -> dict[str, Any]:
    """Return saved arrays, by path, as the tree of a model; `like` is a tree of the same structure."""
    paths = arrays_from_params(like, weights=weights)
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in paths])


def require_same_arrays(seal: Seal, wanted: Shapes, *, folder: Path, within: str = "") -> None:
    """Raise unless a save holds arrays of these names, types and shapes, and no others.

    Args:
        folder: folder of the save, named in the error.
        within: prefix of the paths to compare; the other arrays of the save are ignored.

    Raises:
        CheckpointError: arrays differ; the first five are listed.
    """
    here = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in wanted.items()}
    there = {
        path: f"{dtype}{list(shape)}" for path, (dtype, shape, _) in seal.arrays.items() if path.startswith(within)
    }
    differ = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if not differ:
        return
    # Where a parameter differs, so do its two optimizer moments: then only the parameters are listed.
    listed = [path for path in differ if path.startswith(PARAMS)] or differ
    shown = "".join(
        f"\n  {path}: saved {there.get(path, 'nothing')}, wanted {here.get(path, 'nothing')}"
        for path in listed[:_SHOWN]
    )
    more = f"\n  and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    raise CheckpointError(
        f"{folder} is of another model or optimizer: {len(differ)} arrays differ.{shown}{more}",
        fix="use the config it was saved with, another run.name, or start over with --fresh --force.",
    )


def say_on_stderr(text: str) -> None:
    """Print a message on stderr, on the first process of a run only."""
    if is_first():
        sys.stderr.write(f"{text}\n")


def _saved_path(path: str, weights: Weights) -> str:
    part, _, rest = path.partition(".")
    return f"{_PREFIXES[weights]}stages.{rest}" if part == "blocks" else f"{_PREFIXES[weights]}shared.{path}"


def _as_saved(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _convert(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == wanted.dtype:
        return leaf
    converted = leaf.astype(wanted.dtype)
    # Freed at once, so that only one parameter at a time is held in both types.
    leaf.delete()
    return converted
