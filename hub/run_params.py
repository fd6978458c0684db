"""Read the parameters of a run's save as a model's tree {"embed", "blocks", "head"}, blocks [L, ...].

A run saves its whole state; the parameters are the arrays under `params.`, in layer order whatever the mesh was:

    blocks.mlp.up.kernel [L, ...]  <->  params.stages.mlp.up.kernel
    embed.table                    <->  params.shared.embed.table

`train/checkpoints/` writes them; read `model_folder.py` next.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..meshes import CheckpointError
from ..meshes.processes.messages import is_first
from .saves.names import FOLDER, SaveFolder
from .saves.paths import leaves_by_path
from .saves.reader import Arrays, SaveReader, Shapes
from .saves.seal import PARAMS, Seal

_SHOWN = 5


def is_run_folder(folder: str | Path) -> bool:
    """Return whether a folder is one that `trellax train` or `import-hf` writes."""
    return (Path(folder) / FOLDER).is_dir()


def run_saves(folder: str | Path) -> SaveFolder:
    """Return the saves of a run folder.

    Raises:
        CheckpointError: the folder is no run folder.
    """
    if not is_run_folder(folder):
        raise CheckpointError(f"{folder} is no run folder: it has no {FOLDER}.", fix="name one that trellax wrote.")
    return SaveFolder((Path(folder) / FOLDER).absolute())


def read_run_params(folder: str | Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the newest parameters of a run folder, each device reading its part; changes nothing on the disk.

    Args:
        shapes: a tree of `jax.ShapeDtypeStruct` with shardings. Saved are float32 parameters; they are converted.

    Raises:
        CheckpointError: there is no whole save, or it is of another model.
    """
    saved = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding), shapes)
    wanted = arrays_from_params(saved)
    saves = run_saves(folder)

    def choose(seal: Seal) -> Shapes:
        require_same_arrays(seal, wanted, folder=saves / seal.step, within=PARAMS)
        return wanted

    _, arrays = SaveReader(folder=saves, say=say_on_stderr).read(choose)
    return jax.tree.map(_convert, params_from_arrays(arrays, like=shapes), shapes)


def arrays_from_params(params: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of a model's tree by the path under which a run saves them."""
    return {_saved_path(path): leaf for path, leaf in leaves_by_path(params).items()}


def params_from_arrays(arrays: Arrays, *, like: dict[str, Any]) -> dict[str, Any]:
    """Return the model's tree of saved arrays; `like` is a tree of the same structure."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in arrays_from_params(like)])


def require_same_arrays(seal: Seal, wanted: Shapes, *, folder: Path, within: str = "") -> None:
    """Raise unless a save holds arrays of these names, types and shapes, and no others.

    Args:
        folder: of the save, to name it.
        within: start of the paths that are compared; the others of the save are ignored.

    Raises:
        CheckpointError: with the arrays that differ.
    """
    here = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in wanted.items()}
    there = {
        path: f"{dtype}{list(shape)}" for path, (dtype, shape, _) in seal.arrays.items() if path.startswith(within)
    }
    differ = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
    if not differ:
        return
    # The optimizer's arrays follow the parameters': they are only news where the parameters agree.
    news = [path for path in differ if path.startswith(PARAMS)] or differ
    shown = "".join(
        f"\n  {path}: saved {there.get(path, 'nothing')}, wanted {here.get(path, 'nothing')}" for path in news[:_SHOWN]
    )
    more = f"\n  and {len(news) - _SHOWN} more" if len(news) > _SHOWN else ""
    raise CheckpointError(
        f"{folder} is of another model or optimizer: {len(differ)} arrays differ.{shown}{more}",
        fix="use the config it was saved with, another run.name, or start over with --fresh --force.",
    )


def say_on_stderr(text: str) -> None:
    """Print a sentence on stderr, from the first of many processes."""
    if is_first():
        sys.stderr.write(f"{text}\n")


def _saved_path(path: str) -> str:
    part, _, rest = path.partition(".")
    return f"{PARAMS}stages.{rest}" if part == "blocks" else f"{PARAMS}shared.{path}"


def _convert(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if leaf.dtype == wanted.dtype:
        return leaf
    converted = leaf.astype(wanted.dtype)
    # One by one, so that little is there twice.
    leaf.delete()
    return converted
