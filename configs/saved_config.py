"""The config in the seal of a save, which another trellax may have written: what is known of it, and what is not.

One rule for all who read a save, training, serving and export alike: a key of `model` that is not known is refused, as
it may change every number; another key or section is left out, and said.
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
_MOST_NAMES = 5
_LONGEST_NAME = 80


def read_saved_config(seal: Seal, *, folder: Path, say: Callable[[str], object]) -> dict[str, dict[str, Any]]:
    """Return the config of a save as plain values, all of them known and valid; keys that are younger are missing.

    Args:
        folder: of the save, to name it.
        say: told which keys are left out.

    Raises:
        CheckpointError: a key of the model is not known, or a value cannot be.
    """
    known = set(config_keys())
    unknown = [f"{section}.{key}" for section, keys in seal.config.items() for key in keys or [""]]
    unknown = [name.rstrip(".") for name in unknown if name not in known and name.rstrip(".") not in _sections(known)]
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
    # Before anything of these sizes is made: a model of a billion layers takes for ever to describe.
    here, there = param_counts(config.model).total, _count_saved(seal)
    if here != there:
        raise CheckpointError(
            f"{folder} was saved with the config of a model of {here:,} parameters, and holds {there:,}.", fix=_FIX
        )
    return values


def _count_saved(seal: Seal) -> int:
    return sum(math.prod(shape) for path, (_, shape, _) in seal.arrays.items() if path.startswith("params."))


def _sections(known: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in known}


def _keep(config: Mapping[str, Any], known: set[str]) -> dict[str, dict[str, Any]]:
    kept = {
        section: {key: value for key, value in keys.items() if f"{section}.{key}" in known}
        for section, keys in config.items()
    }
    return {section: keys for section, keys in kept.items() if section in _sections(known)}


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    # A name from elsewhere may hold what a terminal obeys.
    return ", ".join(ascii(name[:_LONGEST_NAME])[1:-1] for name in names[:_MOST_NAMES]) + more
