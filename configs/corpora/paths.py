"""Find the files of `data.paths`, given by paths and by globs.

`**` visits each folder once, however many links lead to it. With two links to a parent folder inside it, the `glob`
module would follow 2**40 paths. `../../train/data/corpus_files.py` checks what is in the files.
"""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...meshes import DataError
from ...meshes.errors import shown, suggest
from ...meshes.files.regular_file import name_kind
from .folders import find_folder_files


def find_files(paths: Sequence[str]) -> list[Path]:
    """Return the files of `data.paths` in the order of the paths, those of a glob sorted; no file is opened.

    Raises:
        DataError: a file is missing or named twice, a glob matches nothing, or a path is not a file.
    """
    if not paths:
        raise DataError("data.paths is empty, so there is nothing to read.", fix="name files or globs in data.paths.")
    _check_named_once(paths)
    return list(dict.fromkeys(file for path in paths for file in _match_files(path)))


def find_validation_files(name: str, paths: Sequence[str]) -> list[Path]:
    """Return the files of a set of `data.validation`, as `find_files` does.

    Raises:
        DataError: as `find_files`; it names the set.
    """
    try:
        return find_files(paths)
    except DataError as error:
        raise DataError(of_validation(error.problem, name), fix=error.fix and of_validation(error.fix, name)) from None


def of_validation(text: str, name: str) -> str:
    """Return a text about `data.paths` as one about a set of `data.validation`."""
    return text.replace("data.paths", f"data.validation, {name}")


def _check_named_once(paths: Sequence[str]) -> None:
    """Raise if a path is given twice, which other programs understand as a weight."""
    seen = set()
    for path in paths:
        # Links are resolved: two links to one file name it twice.
        name = _resolve(path)
        if name in seen:
            raise DataError(
                f"data.paths names {shown(path)} more than once; a file is read once, and counts once.",
                fix="name it once. To weigh it beside other paths, set data.weights.",
            )
        seen.add(name)


def _resolve(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError:  # a null character, which no file name has
        return path


def _match_files(path: str) -> list[Path]:
    if not path.strip():
        raise DataError(f"data.paths: {shown(path)} names no file.", fix="name files or globs in data.paths.")
    try:
        if Path(path).is_file():
            return [Path(path)]
        found = find_folder_files(Path(path)) if Path(path).is_dir() else None
        return _match_pattern(path) if found is None else found
    except OSError as error:
        raise DataError(
            f"data.paths: {shown(path)} cannot be read: {error.strerror}.", fix="correct data.paths."
        ) from None


def _match_pattern(path: str) -> list[Path]:
    if Path(path).is_dir():
        raise DataError(
            f"data.paths: {shown(path)} is a folder.", fix=f"write {path.rstrip('/')}/**/*.txt for its files."
        )
    pattern = _escape_folders(f"{path}/*" if path.rpartition("/")[2] == "**" else path)
    if not glob.has_magic(pattern):
        raise _no_file(path)
    files = {os.path.realpath(name): Path(name) for name in sorted(_expand(pattern), reverse=True) if _is_file(name)}
    if files:
        return sorted(files.values())
    if "[" in pattern.rpartition("/")[2]:
        fix = "in a glob [1] is a choice of letters; write [[]1] for the brackets themselves."
    else:
        fix = "correct data.paths." if Path(path).is_absolute() else "paths start at the folder of the command."
    raise DataError(f"data.paths: no file matches {shown(path)}.", fix=fix)


def _no_file(path: str) -> DataError:
    file = Path(path)
    if file.is_symlink() and not file.exists():
        return DataError(f"data.paths: {shown(path)} is a link that leads nowhere.", fix="correct data.paths.")
    if file.exists():
        kind = name_kind(file.stat().st_mode)
        return DataError(f"data.paths: {shown(path)} is {kind}, where a file should be.", fix="correct data.paths.")
    siblings = [str(file) for file in file.parent.glob("*") if file.is_file()]
    return DataError(f"data.paths: {shown(path)} does not exist.{suggest(path, siblings)}", fix="correct data.paths.")


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _escape_folders(pattern: str) -> str:
    """Escape the leading folders of a pattern that exist literally, such as a folder named `run[1]`."""
    parts = pattern.split("/")
    for index in range(len(parts) - 1):
        if not Path("/".join(parts[: index + 1]) or "/").is_dir():
            return "/".join([*map(glob.escape, parts[:index]), *parts[index:]])
    return "/".join([*map(glob.escape, parts[:-1]), parts[-1]])


def _expand(pattern: str) -> Iterator[str]:
    """Yield the paths that a glob matches: `**` is expanded by `_walk`, the rest by the `glob` module."""
    start, deep, rest = f"/{pattern}".partition("/**/")
    if not deep:
        # Path.glob takes no absolute patterns.
        yield from glob.iglob(pattern)  # noqa: PTH207
        return
    while rest.startswith("**/"):
        rest = rest[len("**/") :]
    for folder in glob.iglob(f"{start}/"[1:]) if start else ["."]:  # noqa: PTH207
        for below in _walk(folder):
            yield from _expand(glob.escape(below) + rest)


def _walk(folder: str) -> Iterator[str]:
    """Yield a folder and the folders below it as `name/`, each once; hidden folders are skipped, as in globs."""
    seen = set()
    for path, names, _ in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        names[:] = sorted(name for name in names if not name.startswith(".") and real not in seen)
        if real not in seen:
            seen.add(real)
            yield f"{path.rstrip('/')}/"
