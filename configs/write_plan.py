"""A config file with a plan in it: the same text, but for the keys that a plan decides or the command line set.

Comments that a plan makes untrue go: those before the first section, which say mesh, hardware, time and what to expect,
make place for the plan's own, those on or right above a value go with the value, and all of [mesh] and [pipeline] go
where the plan changes these: they tell of the old layout, on whichever key they stand.
"""

import json
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from ..meshes import ConfigError
from ..plan.costs.layout import Layout
from .keys import list_keys
from .run_config import RunConfig
from .toml_file import Override, read_config_file, read_overrides

# What belongs to the old stages and schedule goes back to its default.
_LAID_OUT = ("mesh", "pipeline")
_RESET = (("layers_per_stage", '"auto"'), ("max_in_flight", "0"))


def write_plan(path: str, layout: Layout, *, header: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """Return the text of a config with the overrides' and the layout's keys set; every other key stays.

    Args:
        header: lines of the comment that the text begins with.
        overrides: words of the command line, as `load_config` took them; the layout wins over them.

    Raises:
        ConfigError: the file cannot be read, or holds its sections in a form that is not edited line by line.
    """
    file = read_config_file(path)
    given, _ = read_overrides(overrides, keys=list_keys(RunConfig))
    text, wanted = _without_header(file.text), _values(layout, given, was=file.values)
    for section, values in wanted.items():
        before = text
        for key, value in values.items():
            text = _set(text, section, key, value)
        if section in _LAID_OUT and text != before:
            text = _without_comments(text, section)
    _check(text, wanted, shown=file.shown)
    return "".join(f"# {line}\n" for line in header) + "\n" + text


def _without_header(text: str) -> str:
    """The text from its first line on that is neither empty nor a comment."""
    lines = text.splitlines(keepends=True)
    start = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(lines[start:])


def _without_comments(text: str, section: str) -> str:
    """The text without the comments of a section: in it, on its name and right above that."""
    above = r"(?:^[ \t]*#[^\n]*\n)*"
    found = re.search(rf"{above}^\[{section}\].*?(?=\Z|{above}^\[)", text, re.MULTILINE | re.DOTALL)
    if not found:
        return text
    lines = [line for line in found[0].splitlines(keepends=True) if not line.lstrip().startswith("#")]
    # A mark within quotes is of the value.
    bare = [re.sub(r"""^((?:[^#"'\n]|"[^"\n]*"|'[^'\n]*')*?)[ \t]*#[^\n]*""", r"\1", line) for line in lines]
    return text[: found.start()] + "".join(bare) + text[found.end() :]


def _check(text: str, wanted: dict[str, dict[str, str]], *, shown: str) -> None:
    try:
        found = tomllib.loads(text)
        done = all(
            found[section][key] == tomllib.loads(f"x = {value}")["x"]
            for section, values in wanted.items()
            for key, value in values.items()
        )
    except tomllib.TOMLDecodeError:
        done = False
    if not done:
        keys = ", ".join(
            f"{section}.{key} = {value}" for section, values in wanted.items() for key, value in values.items()
        )
        raise ConfigError(
            f"{shown}: its sections are not all written as [section] with a key a line, so the plan cannot be put in.",
            fix=f"write them so, or set {keys}.",
        )


def _values(layout: Layout, given: Sequence[Override], *, was: Any) -> dict[str, dict[str, str]]:
    """The keys to set as TOML, by section: what was asked for, and over it what the plan chose."""
    values: dict[str, dict[str, str]] = {}
    for override in given:
        # A TOML string escapes as JSON does, but for letters outside of ASCII.
        text = json.dumps(override.value, ensure_ascii=False)
        values.setdefault(override.section, {})[override.key] = text
    for section, chosen in _chosen(layout).items():
        values[section] = values.get(section, {}) | chosen
    for key, default in _RESET:
        if key in was.get("pipeline", {}) or key in values["pipeline"]:
            values["pipeline"][key] = default
    run = was.get("run", {}) | values.get("run", {})
    if str(run.get("fake_devices", 0)) != "0":
        values.setdefault("run", {})["fake_devices"] = str(layout.data * layout.tensor * layout.pipe)
    return values


def _chosen(layout: Layout) -> dict[str, dict[str, str]]:
    return {
        "mesh": {"data": str(layout.data), "tensor": str(layout.tensor), "pipe": str(layout.pipe)},
        "pipeline": {
            "schedule": f'"{layout.schedule}"',
            "chunks": str(layout.chunks),
            "microbatches": str(layout.microbatches),
            "remat": f'"{layout.remat}"',
        },
        "optimizer": {"zero": '"on"' if layout.zero else '"off"'},
    }


def _set(text: str, section: str, key: str, value: str) -> str:
    """The text with one key of one section replaced, or added at the section's top."""
    found = re.search(rf"^\[{section}\][^\n]*\n", text, re.MULTILINE)
    if not found:
        return f"{text.rstrip()}\n\n[{section}]\n{key} = {value}\n"
    start = found.end()
    following = re.search(r"^\[", text[start:], re.MULTILINE)
    end = start + following.start() if following else len(text)
    body = text[start:end]
    line = re.compile(rf"((?:^#[^\n]*\n)*)^({key}\s*=\s*)([^#\n]*?)(?:\s*#[^\n]*)?$", re.MULTILINE)
    if old := line.search(body):
        if old[3] != value:
            body = f"{body[: old.start()]}{old[2]}{value}{body[old.end() :]}"
    else:
        body = f"{key} = {value}\n{body}"
    return text[:start] + body + text[end:]
