"""Read the config in the record of a save, which another version of trellax may have written.

One rule for all readers (training, serving, export): an unknown key of `model` is refused, as it may change every
number (`../hub/saved_model.py`); another unknown key or section is left out, and named.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..hub.run_params import run_saves, say_on_stderr
from ..hub.saved_model import check_model_keys, check_saved_size, list_keys, unreadable_config
from ..hub.saves.reader import SaveReader
from ..hub.saves.seal import Seal
from ..meshes import ConfigError
from .run_config import RunConfig, config_from_dict, config_keys


def load_saved_config(folder: str | Path) -> RunConfig:
    """Return the config of the newest whole save in a run folder; names unknown keys on stderr.

    Raises:
        CheckpointError: there is no save, or it is of a model that this version does not know.
    """
    saves = run_saves(folder)
    seal = SaveReader(folder=saves).require_newest()
    return config_from_dict(read_saved_config(seal, folder=saves / seal.step, say=say_on_stderr))


def read_saved_config(seal: Seal, *, folder: Path, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Return the config of a save as plain values, all of them known and valid; keys that are younger are missing.

    Args:
        folder: of the save, to name it.
        say: called with the keys that are left out.

    Raises:
        CheckpointError: a key of the model is not known, or a value is not valid.
    """
    check_model_keys(seal, folder=folder)
    known = set(config_keys())
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
