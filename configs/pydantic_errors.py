"""Convert pydantic's validation errors to mistakes with a place: file and line, or override.

pydantic's messages are written for programmers; `_WORDS` replaces them by ones for users of run files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..meshes import TrellaxError
from ..meshes.axes import ROLES
from ..meshes.errors import printable, shown
from ..meshes.spec import MOST_FAKE_DEVICES
from .keys import MOVED, Key
from .mistakes import Mistake, find_nearest
from .overrides import Override
from .toml_file import ConfigFile

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
"""The message for each of pydantic's error types."""

_BOUNDS = {
    MOST_FAKE_DEVICES: ", each of which is threads and memory of this machine",
    2**31 - 1: ", the largest whole number of 32 bits",
}
"""The reasons for upper bounds that are not obvious, appended to the message."""

_MAX_NAME = 60


def list_mistakes(
    errors: Sequence[Any],
    *,
    unrepresentable: Mapping[tuple[str, ...], str],
    file: ConfigFile | None,
    overrides: Sequence[Override],
    keys: Sequence[Key],
) -> list[Mistake]:
    """Return pydantic's errors as mistakes: those in the file in the order of its lines, then those in overrides.

    Args:
        errors: `ValidationError.errors()`.
        unrepresentable: problems found by `make_plain` before pydantic ran, by (section, key).
    """
    in_file: list[tuple[int, Mistake]] = []
    in_overrides: list[Mistake] = []
    for names, error in _first_of_each(errors).items():
        text = unrepresentable.get(names) or _describe(error, names=names, keys=keys)
        fix = getattr(error.get("ctx", {}).get("error"), "fix", None)
        blamed = _find_overrides(error, names=names, overrides=overrides)
        if blamed:
            place = " ".join(override.shown for override in blamed)
            in_overrides.append(Mistake(place=place, text=text, fix=fix))
        else:
            place = file.place(*names) if file else ""
            line = (file.line(*names) or 0) if file else 0
            name = ".".join(printable(part, limit=_MAX_NAME) for part in names)
            in_file.append((line, Mistake(place=place, text=f"{name}: {text}", fix=fix)))
    in_file.sort(key=lambda entry: entry[0])
    return [*(mistake for _, mistake in in_file), *in_overrides]


def _first_of_each(errors: Sequence[Any]) -> dict[tuple[str, ...], Any]:
    """Return the first error of each (section, key), so that a list with a thousand wrong entries is one mistake."""
    first: dict[tuple[str, ...], Any] = {}
    for error in errors:
        first.setdefault(tuple(str(name) for name in error["loc"][:2]), error)
    return first


def _find_overrides(
    error: Mapping[str, Any], *, names: tuple[str, ...], overrides: Sequence[Override]
) -> list[Override]:
    """Return the overrides that caused an error: all of a section, or the last one that set a key."""
    if error["type"] == "missing":
        return []
    if len(names) == 1:
        return [override for override in overrides if override.section == names[0]]
    return [override for override in overrides if (override.section, override.key) == names][-1:]


def _describe(error: Mapping[str, Any], *, names: tuple[str, ...], keys: Sequence[Key]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return _describe_unknown(names, value=error["input"], keys=keys)
    if kind == "missing":
        return _describe_missing(names, keys=keys)
    if kind in ("model_type", "dataclass_type", "dataclass_exact_type"):
        return f"expected a section, [{names[0]}], got {_show(error['input'])}"
    if kind == "value_error":
        cause = context["error"]
        return cause.problem if isinstance(cause, TrellaxError) else str(cause)
    words = _WORDS[kind].format(**context) if kind in _WORDS else error["msg"].lower()
    if kind == "less_than_equal":
        words += _BOUNDS.get(context["le"], "")
    guess = _guess_choice(error["input"], context) if kind == "literal_error" else ""
    return f"{words}, got {_show(error['input'])}{guess}"


def _describe_unknown(names: tuple[str, ...], *, value: Any, keys: Sequence[Key]) -> str:
    """Return the message for an unknown section or key, with the most likely one that was meant."""
    home = next((key.section for key in keys if key.key == names[-1]), None)
    if len(names) == 1 and isinstance(value, dict):
        sections = list(dict.fromkeys(key.section for key in keys))
        near = find_nearest(names[0], sections)
        return "unknown section; " + (f"did you mean [{near}]?" if near else f"known are {', '.join(sections)}")
    if len(names) == 1:
        return "unknown key outside a section" + (f"; it belongs in [{home}]" if home else "")
    if moved := MOVED.get(".".join(names)):
        return f"unknown key; {moved}"
    if home:
        return f"unknown key; it belongs in [{home}]"
    siblings = [key.key for key in keys if key.section == names[0]]
    near = find_nearest(names[1], siblings)
    own = f", and axes of other names have a role in [mesh.{ROLES}]" if names[0] == "mesh" else ""
    return "unknown key; " + (f"did you mean {near}?" if near else f"[{names[0]}] has {', '.join(siblings)}{own}")


def _describe_missing(names: tuple[str, ...], *, keys: Sequence[Key]) -> str:
    needed = [key.key for key in keys if key.section == names[0] and key.default == "required"]
    if len(names) == 1:
        return f"this section is missing; it needs {', '.join(needed)}"
    return "this key is missing, and it has no default"


def _guess_choice(value: Any, context: Mapping[str, Any]) -> str:
    choices = [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(", ")]
    near = find_nearest(value, choices) if isinstance(value, str) else None
    return f"; did you mean '{near}'?" if near else ""


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shown(value, limit=_MAX_NAME)
