"""Find the folder of a model that Hugging Face's tools have downloaded, by its name on the hub; nothing is downloaded.

The cache has a folder for each model (huggingface_hub, "Understand caching"):

    models--org--name/refs/main             the revision that the branch had when it was downloaded
    models--org--name/snapshots/REVISION    its files, links into models--org--name/blobs

`folder.py` reads the files, and follows those links.
"""

import os
import re
from pathlib import Path

from ..meshes import CheckpointError
from ..meshes.errors import shown

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MAX_REVISION = 200


def find_model_folder(name: str | Path) -> Path:
    """Return the folder that a path or the name of a downloaded model means; other names are returned as they are.

    >>> find_model_folder("runs/quickstart")  # "org/name" gives the path of .../models--org--name/snapshots/REVISION
    PosixPath('runs/quickstart')

    A folder of that name is preferred. The folder of a model in a cache, models--org--name, means its snapshot.

    Raises:
        CheckpointError: the cache has the model, but no whole download of its branch main, or several others.
    """
    path = Path(name)
    if path.is_dir():
        is_cached = path.name.startswith("models--") and (path / "snapshots").is_dir()
        return _find_snapshot(path) if is_cached else path
    if path.exists() or not _NAME.fullmatch(str(name)):
        return path
    cached = cache_root() / f"models--{str(name).replace('/', '--')}"
    return _find_snapshot(cached) if (cached / "snapshots").is_dir() else path


def name_of(folder: str | Path) -> str:
    """Return the name of a model by its folder: that on the hub of a snapshot of a cache, or else the folder's own.

    >>> name_of("hub/models--org--name/snapshots/a07cc9a0"), name_of("runs/quickstart")
    ('org/name', 'quickstart')
    """
    path = find_model_folder(folder).absolute()
    cached = path.parent.parent.name
    if path.parent.name == "snapshots" and cached.startswith("models--"):
        return _hub_name(path.parent.parent)
    return path.resolve().name


def cache_root() -> Path:
    """Return the cache of huggingface_hub, as it finds it: HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, or ~/.cache."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if given := os.environ.get(variable):
            return Path(os.path.expandvars(given)).expanduser()
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def _find_snapshot(cached: Path) -> Path:
    """Return the snapshot of the branch main, or the only one there is."""
    main = cached / "refs" / "main"
    if main.is_file():
        revision = main.read_bytes()[:_MAX_REVISION].decode("utf-8", "replace").strip()
        if not re.fullmatch(r"[\w.-]+", revision) or not (cached / "snapshots" / revision).is_dir():
            raise CheckpointError(
                f"{cached}: refs/main names the revision {shown(revision)}, and snapshots has no such folder.",
                fix=f"download the model again: hf download {_hub_name(cached)}.",
            )
        return cached / "snapshots" / revision
    found = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    revisions = ", ".join(path.name for path in found) or "none"
    raise CheckpointError(
        f"{cached} has {len(found)} revisions ({revisions}), and refs/main names none of them.",
        fix=f"name one of {cached / 'snapshots'}/..." if found else f"hf download {_hub_name(cached)}.",
    )


def _hub_name(cached: Path) -> str:
    return cached.name.removeprefix("models--").replace("--", "/", 1)
