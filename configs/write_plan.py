"""Write the layout of a plan into the text of a config file, and keep everything else of the text.

Comments that may no longer be true are removed:
- the header before the first section (hardware, time, expected loss), which the plan's own header replaces;
- comments on, or right above, a value that changes;
- all comments of [mesh] and [pipeline], if any value of that section changes.
"""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

import tomlkit
from tomlkit.container import Container
from tomlkit.items import Comment, Table, Whitespace

from ..meshes.axes import KNOWN_ROLES
from ..plan.costs.layout import Layout
from .keys import list_keys, own_mesh_keys
from .mesh_section import own_axes, rename_axes
from .overrides import Override, read_overrides
from .run_config import RunConfig, set_value
from .toml_file import read_config_file

Sections = dict[str, dict[str, Any]]
"""Values by section and key."""

_LAID_OUT = ("mesh", "pipeline")
_RESET = {"layers_per_stage": "auto", "max_in_flight": 0}
"""Keys of [pipeline] that describe the old mesh, stages and schedule: if set, they are reset to their defaults."""


def write_plan(path: str, layout: Layout, *, header: Sequence[str], overrides: Sequence[str] = ()) -> str:
    """Return the text of a config file with the keys of a layout, and of overrides, set.

    Args:
        header: lines of the comment at the top of the text.
        overrides: words of the command line, as `load_config` takes them; the layout takes precedence.

    Raises:
        ConfigError: the file cannot be read.
    """
    file = read_config_file(path)
    own_keys = own_mesh_keys(own_axes(file.values.get("mesh"), overrides))
    given, _ = read_overrides(overrides, keys=[*list_keys(RunConfig), *own_keys])
    wanted = _list_values(layout, given, was=file.values)
    document = tomlkit.parse(_drop_header(file.text))
    for section, values in wanted.items():
        is_changed = _set_values(document, section, values)
        if section in _LAID_OUT and is_changed:
            _drop_comments(document, section)
    text = tomlkit.dumps(document)
    # `load_config` parses with tomllib, so the text that tomlkit wrote must mean the same there.
    written = tomllib.loads(text)
    assert all(written[section].items() >= values.items() for section, values in wanted.items())
    return "".join(f"# {line}\n" for line in header) + "\n" + text


def _list_values(layout: Layout, given: Sequence[Override], *, was: Mapping[str, Any]) -> Sections:
    """Return the values to set: those of the overrides, and over them those of the layout."""
    values: Sections = {}
    for override in given:
        set_value(values, override)
    for section, chosen in _list_chosen(layout).items():
        values[section] = values.get(section, {}) | chosen
    values["mesh"] = _rename_mesh(values["mesh"], was=was.get("mesh", {}))
    for key, default in _RESET.items():
        if key in was.get("pipeline", {}) or key in values["pipeline"]:
            values["pipeline"][key] = default
    if layout.context > 1 or "context_attention" in {**was.get("pipeline", {}), **values["pipeline"]}:
        values["pipeline"]["context_attention"] = layout.context_attention
    if "offload" in was.get("train", {}) or "offload" in values["train"]:
        values["train"]["offload"] = layout.offload
    run = was.get("run", {}) | values.get("run", {})
    if run.get("fake_devices", 0) != 0:
        values.setdefault("run", {})["fake_devices"] = layout.num_devices
    return values


def _rename_mesh(chosen: Mapping[str, Any], *, was: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chosen sizes, and what overrides say, by the names of the file's axes."""
    own = {key: value for key, value in chosen.items() if key not in KNOWN_ROLES}
    return own | rename_axes({key: chosen[key] for key in KNOWN_ROLES}, {**was, **own})


def _list_chosen(layout: Layout) -> Sections:
    return {
        "mesh": {"expert": 1, "context": 1, "context_expert": 1} | layout.mesh.sizes,
        "pipeline": {
            "schedule": layout.schedule,
            "chunks": layout.chunks,
            "microbatches": layout.microbatches,
            "remat": layout.remat,
        },
        "train": {"shard": layout.shard} | ({"offload": layout.offload} if layout.offload != "none" else {}),
    }


def _drop_header(text: str) -> str:
    """Return the text without the blank lines and comments at its top."""
    lines = text.splitlines(keepends=True)
    start = next((place for place, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    return "".join(lines[start:])


def _set_values(document: tomlkit.TOMLDocument, section: str, values: Mapping[str, Any]) -> bool:
    """Set the values of a section, which is added where it is missing, and return whether any of them is new."""
    if section not in document:
        document[section] = tomlkit.table()
    table: Any = document[section]
    changed = {key: value for key, value in values.items() if key not in table or table[key] != value}
    for key, value in changed.items():
        if isinstance(table, Table) and key in table:
            _drop_comments_of_key(table.value, key)
        table[key] = value
    return bool(changed)


def _drop_comments_of_key(container: Container, key: str) -> None:
    """Drop the comment on the line of a key, and those right above it."""
    place = _find_place(container, key)
    container.body[place][1].trivia.comment = container.body[place][1].trivia.comment_ws = ""
    _drop_comments_before(container, place)


def _drop_comments(document: Container, section: str) -> None:
    """Drop the comments on the header of a section, right above it, and inside it."""
    place = _find_place(document, section)
    table = document.body[place][1]
    table.trivia.comment = table.trivia.comment_ws = ""
    _drop_comments_before(document, place)
    if not isinstance(table, Table):  # `mesh = { data = 2 }` has no comments inside
        return
    body = table.value.body
    # tomlkit puts the comments right above the next table at the end of this one; they belong to the next.
    is_last = place == len(document.body) - 1
    end = len(body) if is_last else _find_last_comments(table.value, len(body))
    for index, (key, item) in enumerate(body[:end]):
        if isinstance(item, Comment):
            _blank(table.value, index)
        elif key is not None:
            item.trivia.comment = item.trivia.comment_ws = ""


def _drop_comments_before(container: Container, place: int) -> None:
    """Drop the comments right above the item at a place.

    tomlkit counts comments above `[pipe]` to the table before it: `[mesh]`, `data = 2`, `# two nodes`, then `[pipe]`.
    """
    if place and isinstance(above := container.body[place - 1][1], Table):
        container, place = above.value, len(above.value.body)
    for index in range(_find_last_comments(container, place), place):
        _blank(container, index)


def _find_last_comments(container: Container, end: int) -> int:
    """Return the index of the first of the consecutive comments right before `end`."""
    start = end
    while start and isinstance(container.body[start - 1][1], Comment):
        start -= 1
    return start


def _find_place(container: Container, name: str) -> int:
    return next(place for place, (key, _) in enumerate(container.body) if key is not None and key.key == name)


def _blank(container: Container, place: int) -> None:
    # Replaced instead of removed, since the container finds its keys by their index in `body`.
    container.body[place] = (None, Whitespace(""))
