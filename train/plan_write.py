"""A config file with a plan's mesh and pipeline in it: the same text, but for the keys that a plan decides."""

import re
import tomllib

from ..meshes import ConfigError
from ..plan.layouts import Layout
from .config_file import read_config_file


def write_plan(path: str, layout: Layout) -> str:
    """Return the text of a config with the layout's keys set; comments and every other key stay.

    Raises:
        ConfigError: the file cannot be read, or holds its sections in a form that is not edited line by line.
    """
    file = read_config_file(path)
    text, wanted = file.path.read_text(), _values(layout)
    for section, values in wanted.items():
        for key, value in values.items():
            text = _set(text, section, key, value)
    # What belongs to the old stages and schedule goes back to its default.
    for key, value in (("layers_per_stage", '"auto"'), ("max_in_flight", "0")):
        if key in file.values.get("pipeline", {}):
            text = _set(text, "pipeline", key, value)
    _check(text, wanted, shown=file.shown)
    return text


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


def _values(layout: Layout) -> dict[str, dict[str, str]]:
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
    line = re.compile(rf"^({key}\s*=\s*)([^#\n]*?)(\s*(?:#[^\n]*)?)$", re.MULTILINE)
    if line.search(body):
        body = line.sub(lambda match: f"{match[1]}{value}{match[3]}", body, count=1)
    else:
        body = f"{key} = {value}\n{body}"
    return text[:start] + body + text[end:]
