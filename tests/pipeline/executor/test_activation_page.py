"""The page about the way of one activation names functions where they are; `make golden` rewrites its line numbers."""

import os
import re
from pathlib import Path

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
    assert {Path(file).stem for file in files} >= {"step", "grads", "lower", "execute", "enter", "layers", "leave"}
    assert page.count(".py:") == len(files)
