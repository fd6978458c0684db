"""Find the files that an option of a command names, by the rules of `data.paths`."""

from collections.abc import Sequence
from pathlib import Path

from ...configs.corpora.paths import find_files
from ...configs.corpora.prepared import is_prepared
from ...meshes import DataError


def find_named(paths: Sequence[str], *, option: str) -> list[Path]:
    """Return the files of paths and globs.

    Raises:
        DataError: there is none; it names the option.
    """
    for path in filter(_holds_tokens, paths):
        raise DataError(
            f"{option}: {path} holds the tokens that `trellax data prepare` made of texts, and texts are read here.",
            fix="name the files that it was made of; a run reads the tokens by data.source='tokens'.",
        )
    try:
        return find_files(paths)
    except DataError as error:
        fix = error.fix and error.fix.replace("data.paths", option)
        raise DataError(error.problem.replace("data.paths", option), fix=fix) from None


def _holds_tokens(path: str) -> bool:
    """Return whether a path is a folder with shards by `trellax data prepare`."""
    return is_prepared(path) and any(Path(path).glob("tokens-*.npy"))
