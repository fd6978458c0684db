"""Read the `model` section of a save's record, which another version of trellax may have written.

An unknown key of `model` is an error, since it may change every number. `../configs/saved_config.py` reads all sections
by the same rule, and leaves out unknown keys of the others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..layers import ModelConfig, param_counts
from ..meshes import CheckpointError, ModelError
from .saves.seal import PARAMS, Seal

FIX = "use the trellax it was saved with, or a newer one."
"""The `Fix:` line for a save that this version cannot read."""

_MOST_NAMES = 5
_LONGEST_NAME = 80


def read_saved_model(seal: Seal, *, folder: Path) -> ModelConfig:
    """Return the model whose parameters a save holds.

    Args:
        folder: folder of the save, named in errors.

    Raises:
        CheckpointError: a key of the model is unknown, a value is invalid, or the save holds another number of
            parameters than its model has.
    """
    check_model_keys(seal, folder=folder)
    try:
        config = _make_model(seal.config.get("model", {}))
    except ModelError as error:
        raise unreadable_config(folder, f"model: {error.problem}") from None
    except (TypeError, OverflowError, RecursionError) as error:
        raise unreadable_config(folder, f"model: {error}") from None
    check_saved_size(config, seal, folder=folder)
    return config


def _make_model(values: Mapping[str, Any]) -> ModelConfig:
    for field in fields(ModelConfig):
        if field.default is MISSING and field.name not in values:
            raise ModelError(f"{field.name} is missing.")
        value = values.get(field.name)
        # Python's JSON parser accepts NaN and infinities.
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{field.name}={value} is not finite.")
    # JSON has no tuples.
    own = dict(values)
    tuples = [field.name for field in fields(ModelConfig) if isinstance(field.default, tuple)]
    own |= {name: tuple(own[name]) for name in tuples if isinstance(own.get(name), list)}
    return ModelConfig(**own)


def check_model_keys(seal: Seal, *, folder: Path) -> None:
    """Raise unless all keys of the `model` section are known.

    Raises:
        CheckpointError: keys are unknown; the first five are listed.
    """
    known = {field.name for field in fields(ModelConfig)}
    if unknown := [f"model.{key}" for key in seal.config.get("model", {}) if key not in known]:
        raise CheckpointError(
            f"{folder} was saved with {list_keys(unknown)}, which this trellax does not know: its model may be "
            "another.",
            fix=FIX,
        )


def check_saved_size(config: ModelConfig, seal: Seal, *, folder: Path) -> None:
    """Raise unless a save holds as many parameters as a model has, or as its adapters have.

    Call it before anything is built from the sizes of the model: a broken record may ask for a billion layers.

    Raises:
        CheckpointError: the numbers differ; both are given.
    """
    here = param_counts(config).trained
    there = sum(math.prod(shape) for path, (_, shape, _) in seal.arrays.items() if path.startswith(PARAMS))
    if here != there:
        raise CheckpointError(
            f"{folder} was saved with the config of a model of {here:,} parameters, and holds {there:,}.", fix=FIX
        )


def unreadable_config(folder: Path, problem: object) -> CheckpointError:
    """Return the error for a save with an invalid config."""
    return CheckpointError(f"{folder} was saved with a config that this trellax cannot read: {problem}", fix=FIX)


def list_keys(names: Sequence[str]) -> str:
    """Return the first keys of a record as text that is safe to print: another person may have written the record."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(ascii(name[:_LONGEST_NAME])[1:-1] for name in names[:_MOST_NAMES]) + more
