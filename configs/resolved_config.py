"""Write the resolved config of a run into its folder as config.toml: every key with the value it runs with.

`train` writes it before the first step, and loading it continues the run. Mesh sizes are those of the mesh that was
built, never -1.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..meshes import MeshSpec, RunError
from ..meshes.files.own_file import free_name, replace_file
from ..meshes.files.regular_file import open_regular
from .run_config import RunConfig

CONFIG_FILE = "config.toml"
"""The name of the resolved config in a run folder."""

_FIRST_LINE = "# Written by trellax: every key of this run, and rewritten at each start.\n"
_HEADER = f"{_FIRST_LINE}# Command:  trellax train THIS-FILE   (from the same working folder goes on with the run)\n\n"

_GIVEN_FILE = "config.given.toml"
"""The name that a user's own config.toml in a run folder is renamed to."""


def resolve_config(config: RunConfig, *, sizes: MeshSpec) -> RunConfig:
    """Return a config in which mesh sizes of -1 are replaced by the sizes of the mesh it runs on."""
    return config.model_copy(update={"mesh": sizes})


def write_resolved_config(config: RunConfig, *, say: Callable[[str], object]) -> Path:
    """Write a resolved config into its run folder as config.toml, and return the path.

    A config.toml that no run wrote, such as the one of `import-hf`, is kept as config.given.toml.

    Args:
        say: called with a message when such a file was renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    # tomlkit takes longer to import than the rest of `configs`, and only a run that starts writes the file.
    import tomlkit

    path = config.run_folder / CONFIG_FILE
    if os.path.lexists(path) and not is_resolved_config(path):
        given = path.rename(free_name(path.with_name(_GIVEN_FILE)))
        say(f"config    {path} now holds every key of this run; the file that was there is {given.name}")
    values = config.model_dump(mode="json")
    replace_file(path, (_HEADER + tomlkit.dumps(values)).encode())
    return path


def is_resolved_config(path: Path) -> bool:
    """Return whether a file is a config.toml that a run wrote, by its first line; False if it cannot be read."""
    try:
        with open_regular(path, links="refuse", error=RunError) as file:
            return file.readline(len(_FIRST_LINE) + 1) == _FIRST_LINE.encode()
    except (OSError, RunError):
        return False


def list_hyperparameters(config: RunConfig) -> dict[str, Any]:
    """Return the values of a run that change its result or its speed, by `section.key`, for TensorBoard's HPARAMS tab.

    The sections `run` (but for the seed) and `checkpoint` are left out. Lists and the roles of a mesh become
    text, since TensorBoard has no type for them.
    """
    sections: Mapping[str, Mapping[str, Any]] = config.model_dump(mode="json")
    shown = {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if section not in ("run", "checkpoint")
        for key, value in keys.items()
    }
    texts = {name: _as_text(value) for name, value in shown.items() if isinstance(value, list | dict)}
    return {"run.seed": config.run.seed} | shown | texts


def _as_text(value: list[Any] | dict[str, Any]) -> str:
    parts = [f"{name}={own}" for name, own in value.items()] if isinstance(value, dict) else map(str, value)
    return ",".join(parts)
