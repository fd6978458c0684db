"""Read the config in the seal of a save, which another version of trellax may have written.

Training, serving and export read it by the same rule: an unknown key of `model` is refused, since it may change every
number; other unknown keys and sections are left out, with a message.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..hub.saves.seal import Seal
from ..layers import param_counts
from ..meshes import CheckpointError, ConfigError
from .run_config import config_from_dict, config_keys

_FIX = "use the trellax it was saved with, or a newer one."
_MAX_NAMES = 5
_MAX_NAME = 80


def read_saved_config(seal: Seal, *, folder: Path, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Return the config of a save as plain values, of known keys and valid; keys that it lacks are left out.

    Args:
        folder: the folder of the save, for messages.
        say: called with a message that names the keys left out.

    Raises:
        CheckpointError: a key of the model is unknown, a value is invalid, or the model has another number of
            parameters than was saved.
    """
    known = set(config_keys())
    unknown = _list_unknown(seal.config, known)
    if of_model := [name for name in unknown if name.startswith("model.")]:
        raise CheckpointError(
            f"{folder} was saved with {_list(of_model)}, which this trellax does not know: its model may be another.",
            fix=_FIX,
        )
    if unknown:
        say(f"{folder} was saved with {_list(unknown)}, which this trellax does not know and leaves out")
    values = _keep(seal.config, known)
    try:
        config = config_from_dict(values)
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} was saved with a config that this trellax cannot read: {getattr(error, 'problem', error)}",
            fix=_FIX,
        ) from None
    # Compared before anything of these sizes is built: a damaged config may describe a model of a billion layers.
    here, there = param_counts(config.model).total, _count_saved(seal)
    if here != there:
        raise CheckpointError(
            f"{folder} was saved with the config of a model of {here:,} parameters, and holds {there:,}.", fix=_FIX
        )
    return values


def _count_saved(seal: Seal) -> int:
    return sum(math.prod(shape) for path, (_, shape, _) in seal.arrays.items() if path.startswith("params."))


def _list_unknown(config: Mapping[str, Any], known: set[str]) -> list[str]:
    """Return unknown keys as `section.key`, and unknown sections that are empty by their name."""
    unknown: list[str] = []
    for section, keys in config.items():
        if not keys and section not in _sections(known):
            unknown.append(section)
        unknown += [f"{section}.{key}" for key in keys if f"{section}.{key}" not in known]
    return unknown


def _sections(known: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in known}


def _keep(config: Mapping[str, Any], known: set[str]) -> dict[str, dict[str, Any]]:
    kept = {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" in known}
        for section, keys in config.items()
    }
    return {section: keys for section, keys in kept.items() if section in _sections(known)}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    # A name from another program's file may hold terminal escapes.
    return ", ".join(ascii(name[:_MAX_NAME])[1:-1] for name in names[:_MAX_NAMES]) + more
