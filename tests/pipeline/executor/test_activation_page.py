"""The page about the way of one activation names functions where they are; `make golden` rewrites its line numbers."""

import os
import re
import traceback
from collections import Counter
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
from trellax.pipeline import StageFns, pipeline_grads

from ..tiny import FNS, tiny_given

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/internals/activation.md"
STEP = re.compile(r"`([\w/]+\.py):(\d+)` `(\w+)`")


def _with_its_line(step: re.Match[str]) -> str:
    """The step with the line on which its file defines its function."""
    file, _, name = step.groups()
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
    assert found, f"{file} has no {name}"
    return f"`{file}:{found[0]}` `{name}`"


def test_page_names_functions_on_their_lines() -> None:
    page = PAGE.read_text(encoding="utf-8")
    wanted = STEP.sub(_with_its_line, page)
    if os.environ.get("GOLDEN") == "1":
        PAGE.write_text(wanted, encoding="utf-8")
        return
    assert page == wanted


def test_page_walks_through_the_files_of_the_executor() -> None:
    page = PAGE.read_text(encoding="utf-8")
    files = [step[1] for step in STEP.finditer(page)]
    way = "step grads region lower execute ends_together enter layers leave"
    assert {Path(file).stem for file in files} >= {*way.split()}
    assert page.count(".py:") == len(files)


def _trace(schedule: str) -> list[tuple[str, list[str]]]:
    """Trace a pipeline; return each call of a user's function with the executor's files that it was called through."""
    calls: list[tuple[str, list[str]]] = []

    def watch(name: str, *args: Any) -> Any:
        files = [
            frame.filename for frame in traceback.extract_stack() if "/trellax/pipeline/executor/" in frame.filename
        ]
        calls.append((name, [key for key, _ in groupby(files)]))
        return FNS[name](*args)

    given = tiny_given("2x1x2", schedule=schedule)
    fns: dict[str, Any] = {name: partial(watch, name) for name in FNS}
    run = partial(pipeline_grads, StageFns(**fns), **given)
    jax.make_jaxpr(run)()
    return calls


def test_no_file_is_entered_twice_on_the_way_to_a_function() -> None:
    for schedule in ("1f1b", "zb-h1"):
        for name, files in _trace(schedule):
            assert len(files) == len(set(files)), (name, files)


def test_functions_are_traced_as_often_as_the_page_says() -> None:
    rows = re.findall(
        r"^\| ([^|]*) \| (\d) \| (\d) \| (\d) \| [^|]* \|$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    said = {name: sum(int(row[column]) for row in rows) for column, name in enumerate(FNS, 1)}
    assert Counter(name for name, _ in _trace("1f1b")) == said
