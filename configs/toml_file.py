"""Find, decode and parse the TOML file of a run, and report syntax errors with their line."""

import codecs
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..meshes import ConfigError
from ..meshes.errors import suggest
from ..meshes.files.regular_file import read_bounded
from .toml_lines import Lines, map_lines

PACKAGED_CONFIGS = Path(__file__).parent
"""The folder of the packaged configs."""

_MAX_BYTES = 1_000_000

# tomllib takes quadratic time for a long dotted key, and so would a pattern that backtracks; `*+` does not.
_NAME = r"""(?:[\w\-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*(?:{_NAME}[ \t]*\.[ \t]*){{50}}", flags=re.MULTILINE)
_LONG_NUMBER = re.compile(r"\d{4301}")
_TOML_FIX = 'write `key = value`, text in "quotes", sections as [name].'
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A parsed TOML file.

    `shown` is the path as errors print it. `text` has Unix line ends and no byte order mark.
    """

    path: Path
    shown: str
    text: str
    values: Mapping[str, Any]

    @cached_property
    def lines(self) -> Lines:
        """The line of every section and key; computed at first use, which is the first mistake."""
        return map_lines(self.text)

    def line(self, *names: str) -> int | None:
        """Return the line of a key, or of its section if the file does not have the key; None if it has neither."""
        prefixes = (names[:length] for length in range(len(names), 0, -1))
        return next((self.lines[prefix] for prefix in prefixes if prefix in self.lines), None)

    def place(self, *names: str) -> str:
        """Return `file:line` of a key or its section, or only the file if it has neither."""
        line = self.line(*names)
        return self.shown if line is None else f"{self.shown}:{line}"


def read_config_file(path: str | Path) -> ConfigFile:
    """Read the file at `path`, or the packaged config of that name.

    Raises:
        ConfigError: there is no such file, it is not UTF-8 text, or it is not TOML.
    """
    if not str(path).strip():
        raise ConfigError(f"CONFIG is {str(path)!r}, which names no file.", fix="give the path of a TOML file.")
    found = _find_file(Path(path))
    shown = _shorten(found)
    text = _read_text(found, shown=shown)
    if long_key := _LONG_KEY.search(text):
        line = text.count("\n", 0, long_key.end()) + 1
        raise ConfigError(f"{shown}:{line}: this key has too many parts.", fix=_TOML_FIX)
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _toml_error(error, text=text, shown=shown) from None
    return ConfigFile(path=found, shown=shown, text=text, values=values)


def _find_file(path: Path) -> Path:
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.", fix="give the path of a TOML file.") from None
    if is_folder:
        raise ConfigError(f"{path}: this is a folder, not a run file.", fix=f"give a file, {path}/NAME.toml.")
    if is_there:
        return path
    packaged = sorted(PACKAGED_CONFIGS.resolve().glob("*.toml"))
    if len(path.parts) == 1:
        for file in packaged:
            if path.name in (file.stem, file.name):
                return file
    names = [file.stem for file in packaged]
    nearby = sorted(str(file) for file in path.parent.glob("*.toml"))
    raise ConfigError(
        f"{path}: no such file.{suggest(str(path), names + nearby if len(path.parts) == 1 else nearby)}",
        fix=f"give the path of a TOML file, or a packaged config: {', '.join(names)}.",
    )


def _shorten(path: Path) -> str:
    """Return the path relative to the working directory, if it is below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (OSError, ValueError):
        # The path is elsewhere, or the working directory has been removed.
        return str(path)


def _read_text(path: Path, *, shown: str) -> str:
    try:
        content = read_bounded(path, max_bytes=_MAX_BYTES, error=ConfigError)
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror}.", fix="check its permissions.") from None
    try:
        # Editors on Windows write a byte order mark, and CR LF at the end of a line.
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        what = "this is UTF-16 text" if is_wide else "this is not UTF-8 text"
        raise ConfigError(f"{shown}: {what}.", fix="save it as UTF-8." if is_wide else "give a TOML file.") from None


def _toml_error(error: ValueError | RecursionError, *, text: str, shown: str) -> ConfigError:
    """Return a `ConfigError` for an error of tomllib, which gives no line for long numbers and deep nesting."""
    lines = text.split("\n")
    if isinstance(error, RecursionError):
        line = next((number for number, line in enumerate(lines, 1) if line.count("[") + line.count("{") > 50), 1)
        return ConfigError(f"{shown}:{line}: lists and tables are nested too deeply.", fix=_TOML_FIX)
    if not isinstance(error, tomllib.TOMLDecodeError):
        line = next((number for number, line in enumerate(lines, 1) if _LONG_NUMBER.search(line)), 1)
        return ConfigError(f"{shown}:{line}: this number has too many digits.", fix="give a smaller number.")
    match = _TOML_PLACE.search(str(error))
    line = int(match[1]) if match and match[1] else max(1, len(lines) - text.endswith("\n"))
    what = _TOML_PLACE.sub("", str(error)).replace("Cannot overwrite a value", "This key is given twice")
    return ConfigError(f"{shown}:{line}: this is not TOML: {what[:1].lower()}{what[1:]}.", fix=_TOML_FIX)
