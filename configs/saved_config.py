"""Read the config in the record of a save, which another version of trellax may have written.

Training, serving and export follow one rule. An unknown key of `model` is an error, since it may change every number
(`../hub/saved_model.py`). Any other unknown key or section is left out, with a message.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..hub.run_params import run_saves, say_on_stderr
from ..hub.saved_model import check_model_keys, check_saved_size, list_keys, unreadable_config
from ..hub.saves.reader import SaveReader
from ..hub.saves.seal import Seal
from ..meshes import ConfigError
from ..meshes.axes import ROLES
from .keys import own_mesh_keys
from .mesh_section import own_axes
from .run_config import RunConfig, config_from_dict, config_keys


def load_saved_config(folder: str | Path) -> RunConfig:
    """Return the config of the newest whole save in a run folder; unknown keys are listed on stderr.

    Raises:
        CheckpointError: there is no save, or its config has unknown model keys or invalid values.
    """
    saves = run_saves(folder)
    seal = SaveReader(folder=saves).require_newest()
    return config_from_seal(seal, folder=saves / seal.step, say=say_on_stderr)


def config_from_seal(seal: Seal, *, folder: Path, say: Callable[[str], object]) -> RunConfig:
    """Return the config in the record of a save; arguments and errors are those of `read_saved_config`."""
    return config_from_dict(read_saved_config(seal, folder=folder, say=say))


def read_saved_config(seal: Seal, *, folder: Path, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Return the config of a save as nested dicts of known keys with valid values; keys newer than the save are absent.

    Args:
        folder: folder of the save, named in messages.
        say: called with a message that lists the keys that are left out.

    Raises:
        CheckpointError: a key of the model is not known, or a value is not valid.
    """
    check_model_keys(seal, folder=folder)
    own = own_mesh_keys(own_axes(seal.config.get("mesh"), ()))
    known = {*config_keys(), *(key.name for key in own), *([f"mesh.{ROLES}"] if own else [])}
    unknown = [f"{section}.{key}" for section, keys in seal.config.items() for key in keys or [""]]
    unknown = [name.rstrip(".") for name in unknown if name not in known and name.rstrip(".") not in _sections(known)]
    if unknown:
        say(f"{folder} was saved with {list_keys(unknown)}, which this trellax does not know and leaves out")
    values = _keep(seal.config, known)
    try:
        config = config_from_dict(values)
    except (ConfigError, RecursionError) as error:
        raise unreadable_config(folder, getattr(error, "problem", error)) from None
    check_saved_size(config.model, seal, folder=folder)
    return values


def _sections(known: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in known}


def _keep(config: Mapping[str, Any], known: set[str]) -> dict[str, dict[str, Any]]:
    kept = {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" in known}
        for section, keys in config.items()
    }
    return {section: keys for section, keys in kept.items() if section in _sections(known)}
