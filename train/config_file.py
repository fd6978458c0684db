"""Write config.toml into a run folder: every key of the run with the value it runs with."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..configs.run_config import RunConfig
from ..meshes import MeshSpec, RunError
from ..meshes.files.own_file import free_name, replace_file
from ..meshes.files.regular_file import open_regular

CONFIG_FILE = "config.toml"

_FIRST_LINE = "# Written by trellax: every key of this run, and rewritten at each start.\n"
_HEADER = f"{_FIRST_LINE}# Command:  trellax train THIS-FILE   (from the same working folder goes on with the run)\n\n"

_GIVEN_FILE = "config.given.toml"


def resolve_config(config: RunConfig, *, sizes: MeshSpec) -> RunConfig:
    """Return a config with the sizes of the mesh it runs on, where it may have -1 for all remaining devices."""
    return config.model_copy(update={"mesh": sizes})


def write_resolved_config(config: RunConfig, *, say: Callable[[str], object]) -> Path:
    """Write a resolved config into its run folder as config.toml, and return the path.

    A file of that name that no run wrote, such as the one of `import-hf`, is renamed and not lost.

    Raises:
        OSError: the folder cannot be written.
    """
    # Imported here, so that commands that only look at run folders do not wait for it.
    import tomlkit

    path = config.run_folder / CONFIG_FILE
    if os.path.lexists(path) and not is_resolved_config(path):
        given = path.rename(free_name(path.with_name(_GIVEN_FILE)))
        say(f"config    {path} now holds every key of this run; the file that was there is {given.name}")
    values = config.model_dump(mode="json")
    replace_file(path, (_HEADER + tomlkit.dumps(values)).encode())
    return path


def is_resolved_config(path: Path) -> bool:
    """Return whether a file is a config.toml that a run wrote."""
    try:
        with open_regular(path, links="refuse", error=RunError) as file:
            return file.readline(len(_FIRST_LINE) + 1) == _FIRST_LINE.encode()
    except (OSError, RunError):
        return False


def list_hyperparameters(config: RunConfig) -> dict[str, Any]:
    """Return the keys that decide what a run learns and how fast, as `section.key`, for tables of runs.

    Where a run lives and what it keeps is left out; lists become text, since TensorBoard has no type for them.
    """
    sections: Mapping[str, Mapping[str, Any]] = config.model_dump(mode="json")
    shown = {
        f"{section}.{key}": value
        for section, keys in sections.items()
        if section not in ("run", "checkpoint")
        for key, value in keys.items()
    }
    lists = {name: ",".join(map(str, value)) for name, value in shown.items() if isinstance(value, list)}
    return {"run.seed": config.run.seed} | shown | lists
