"""What is wrong with a run file, in plain words and all at once: one line per mistake, with file and line.

pydantic finds the mistakes; its wording is for programmers, so the words here are our own.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..meshes import ConfigError, TrellaxError
from ..meshes.errors import printable, shown
from ..meshes.spec import MOST_FAKE_DEVICES
from .keys import Key

if TYPE_CHECKING:
    from .toml_file import ConfigFile, Override

_WORDS = {
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected text",
    "string_too_short": "expected text that is not empty",
    "string_pattern_mismatch": "expected a folder name, without slashes",
    "tuple_type": "expected a list",
    "greater_than": "expected more than {gt:.10g}",
    "greater_than_equal": "expected at least {ge:.10g}",
    "less_than": "expected less than {lt:.10g}",
    "less_than_equal": "expected at most {le:.10g}",
    "literal_error": "expected {expected}",
}
_BOUNDS = {
    MOST_FAKE_DEVICES: ", each of which is threads and memory of this machine",
    2**31 - 1: ", the largest whole number of 32 bits",
}
"""Why a bound is where it is, for those that do not speak for themselves."""

_GENERAL_FIX = "`trellax train --help` lists every key."
_MOST_LINES = 10
_LONGEST_PLACE, _LONGEST_TEXT = 120, 500


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One thing that is wrong: where it was written, and what it should be."""

    place: str
    text: str
    fix: str | None = None

    def __str__(self) -> str:
        # Cut one by one, so that a long one leaves room for the others.
        text = printable(self.text, limit=_LONGEST_TEXT)
        return f"{printable(self.place, limit=_LONGEST_PLACE)}: {text}" if self.place else text


def make_config_error(mistakes: Sequence[Mistake]) -> ConfigError:
    """Return one error that lists every mistake on a line of its own."""
    if len(mistakes) == 1:
        return ConfigError(str(mistakes[0]), fix=mistakes[0].fix or _GENERAL_FIX)
    first = mistakes[:_MOST_LINES]
    lines = [f"{mistake} Fix: {mistake.fix}" if mistake.fix else str(mistake) for mistake in first]
    if len(mistakes) > len(first):
        lines.append(f"and {len(mistakes) - len(first):,} more mistakes.")
    return ConfigError("\n".join(lines), fix=_GENERAL_FIX)


def list_mistakes(
    errors: Sequence[Any],
    *,
    wrong: Mapping[tuple[str, ...], str],
    file: "ConfigFile | None",
    overrides: Sequence["Override"],
    keys: Sequence[Key],
) -> list[Mistake]:
    """Return pydantic's errors as mistakes, those of the file by line and those of the command line after them.

    Args:
        wrong: what `make_plain` has found already, by section and key.
    """
    found = []
    for names, error in _first_of_each(errors).items():
        blamed = _find_overrides(error, names=names, overrides=overrides)
        text = wrong.get(names) or _describe(error, names=names, keys=keys)
        fix = getattr(error.get("ctx", {}).get("error"), "fix", None)
        if blamed:
            found.append((True, 0, Mistake(place=" ".join(o.shown for o in blamed), text=text, fix=fix)))
        else:
            place = file.place(*names) if file else ""
            line = int(place.rpartition(":")[2]) if file and place != file.shown else 0
            name = ".".join(printable(part, limit=60) for part in names)
            found.append((False, line, Mistake(place=place, text=f"{name}: {text}", fix=fix)))
    return [mistake for _, _, mistake in sorted(found, key=lambda entry: entry[:2])]


def _first_of_each(errors: Sequence[Any]) -> dict[tuple[str, ...], Any]:
    """The first error of every section and key: a list of a thousand wrong entries is one mistake."""
    first: dict[tuple[str, ...], Any] = {}
    for error in errors:
        first.setdefault(tuple(str(name) for name in error["loc"][:2]), error)
    return first


def describe_unknown_option(name: str, *, keys: Sequence[Key]) -> str:
    """Return what to say about `--name`, which is no key: the nearest key, or the one of another section."""
    same = [key.name for key in keys if key.key == name.rpartition(".")[2]]
    near = same[:1] or _nearest(name, [key.name for key in keys])
    return f"unknown option; did you mean --{near[0]}?" if near else "unknown option"


def _find_overrides(
    error: Mapping[str, Any], *, names: tuple[str, ...], overrides: Sequence["Override"]
) -> list["Override"]:
    if error["type"] == "missing":
        return []
    if len(names) == 1:
        return [o for o in overrides if o.section == names[0]]
    return [o for o in overrides if (o.section, o.key) == names][-1:]


def _describe(error: Mapping[str, Any], *, names: tuple[str, ...], keys: Sequence[Key]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _describe_unknown(names, value=error["input"], keys=keys)
    if kind == "missing":
        return _describe_missing(names, keys=keys)
    if kind in ("model_type", "dataclass_type", "dataclass_exact_type"):
        return f"expected a section, [{names[0]}], got {_show(error['input'])}"
    if kind == "value_error":
        error = context["error"]
        return error.problem if isinstance(error, TrellaxError) else str(error)
    words = _WORDS[kind].format(**context) if kind in _WORDS else error["msg"].lower()
    words += _BOUNDS.get(context["le"], "") if kind == "less_than_equal" else ""
    guess = _guess_choice(error["input"], context) if kind == "literal_error" else ""
    return f"{words}, got {_show(error['input'])}{guess}"


def _describe_unknown(names: tuple[str, ...], *, value: Any, keys: Sequence[Key]) -> str:
    sections = list(dict.fromkeys(key.section for key in keys))
    home = next((key.section for key in keys if key.key == names[-1]), None)
    if len(names) == 1:
        near = _nearest(names[0], sections)
        if isinstance(value, dict):
            return "unknown section; " + (f"did you mean [{near[0]}]?" if near else f"known are {', '.join(sections)}")
        return "unknown key outside a section" + (f"; it belongs in [{home}]" if home else "")
    siblings = [key.key for key in keys if key.section == names[0]]
    near = _nearest(names[1], siblings)
    if home:
        return f"unknown key; it belongs in [{home}]"
    return "unknown key; " + (f"did you mean {near[0]}?" if near else f"[{names[0]}] has {', '.join(siblings)}")


def _describe_missing(names: tuple[str, ...], *, keys: Sequence[Key]) -> str:
    needed = [key.key for key in keys if key.section == names[0] and key.default == "required"]
    if len(names) == 1:
        return f"this section is missing; it needs {', '.join(needed)}"
    return "this key is missing, and it has no default"


def _guess_choice(value: Any, context: Mapping[str, Any]) -> str:
    choices = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(", ")]
    near = _nearest(value, choices) if isinstance(value, str) else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=1, cutoff=0.5) if len(name) < _LONGEST_PLACE else []


def _show(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else shown(value, limit=60)
