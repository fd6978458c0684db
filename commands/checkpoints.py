"""`trellax checkpoints`: list the saves of a run folder with their sizes, and verify their files by their hashes.

It imports no jax and changes nothing, so it can be used while the run is training.
"""

import argparse
import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ..hub.saves.names import FOLDER, SaveFolder, is_own_name, read_step
from ..hub.saves.seal import SEAL_FORMAT, Seal, find_damage, read_seal
from ..hub.saves.seal_fields import MAX_DEPTH
from ..meshes import CheckpointError
from ..meshes.axes import ROLES
from ..meshes.columns import align
from ..meshes.errors import suggest
from ..meshes.files.regular_file import walk_folder

_MAX_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class SaveRow:
    """One save, or another entry of the folder; `problem` is "" unless one was found.

    `state` is "sealed" (finished, files not read), "verified", "damaged", "other format", "unfinished", "set aside"
    (renamed by a run that found it damaged) or "no save".
    """

    name: str
    state: str
    num_bytes: int
    saved_at: str
    layout: str
    problem: str


def run_checkpoints(args: argparse.Namespace) -> int:
    """Print the list, and return the exit code, which is 1 if a finished save is damaged.

    Raises:
        CheckpointError: there is no such folder, or no save in it.
    """
    folder = _find_folder(Path(args.folder))
    looked = [_read_row(folder, name, verify=args.verify) for name in sorted(folder.names, key=_sort_key)]
    # A running training removes and renames saves: one that has disappeared is not damaged.
    rows = [row for row in looked if os.path.lexists(folder.path / row.name)]
    if not rows:
        raise CheckpointError(f"{folder.path} holds no checkpoint.", fix="give the folder of a run that has saved.")
    print(json.dumps([asdict(row) for row in rows]) if args.json else _draw_table(folder, rows, verified=args.verify))
    return int(any(row.state == "damaged" for row in rows))


def _find_folder(path: Path) -> SaveFolder:
    for folder in (path / FOLDER, path):
        if folder.name == FOLDER and folder.is_dir():
            return SaveFolder(folder)
    siblings = [str(other) for other in path.parent.glob("*") if (other / FOLDER).is_dir()]
    raise CheckpointError(
        f"{path} is not a run folder: it has no folder {FOLDER}.{suggest(str(path), siblings)}",
        fix="give the folder that `trellax train` wrote, for example runs/NAME.",
    )


def _read_row(folder: SaveFolder, name: str, *, verify: bool) -> SaveRow:
    path = folder.path / name
    if read_step(name) is None:
        state = "no save" if not is_own_name(name) else "set aside" if ".damaged" in name else "unfinished"
        return SaveRow(name=name, state=state, num_bytes=_measure(path), saved_at="", layout="", problem="")
    seal, problem = read_seal(path)
    if seal is None:
        return SaveRow(name=name, state="damaged", num_bytes=0, saved_at="", layout="", problem=problem)
    if seal.format != SEAL_FORMAT:
        problem = f"format {seal.format}; this trellax reads {SEAL_FORMAT}"
        return SaveRow(name=name, state="other format", num_bytes=0, saved_at="", layout="", problem=problem)
    found = find_damage(path, seal) if verify else []
    return SaveRow(
        name=name,
        state="damaged" if found else "verified" if verify else "sealed",
        num_bytes=seal.num_bytes,
        saved_at=seal.saved_at,
        layout=_layout(seal),
        problem="; ".join(found),
    )


def _measure(path: Path) -> int:
    with contextlib.suppress(OSError):
        entries = walk_folder(path, max_depth=MAX_DEPTH)
        return sum(
            entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file(follow_symlinks=False)
        )
    return 0


def _layout(seal: Seal) -> str:
    mesh, pipeline = (seal.config.get(section, {}) for section in ("mesh", "pipeline"))
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.items() if axis != ROLES)
    return f"{sizes} {pipeline.get('schedule', '')}".strip()


def _draw_table(folder: SaveFolder, rows: list[SaveRow], *, verified: bool) -> str:
    cells = [("step", "state", "bytes", "saved at", "saved on")]
    cells += [(_show(row.name), row.state, f"{row.num_bytes:,}", row.saved_at, _show(row.layout)) for row in rows]
    lines = [align(cells, left={1, 3, 4})]
    lines += [f"{_show(row.name)}: {row.problem}" for row in rows if row.problem]
    total = f"{sum(row.num_bytes for row in rows):,} bytes in {folder.path}"
    lines.append(total if verified else f"{total}; --verify reads them")
    return "\n".join(lines)


def _show(text: str) -> str:
    """Return a text from a save's files without terminal escapes, and at most 60 characters of it."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= _MAX_WIDTH else f"{shown[: _MAX_WIDTH - 3]}..."


def _sort_key(name: str) -> tuple[int, str]:
    step = read_step(name.partition(".")[0])
    return (-1 if step is None else step, name)
