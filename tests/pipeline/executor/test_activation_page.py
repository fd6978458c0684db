"""The page about the way of one activation names files, lines and functions as they are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/internals/activation.md").read_text(encoding="utf-8")
STEPS = re.findall(r"`([\w/]+\.py):(\d+)` `(\w+)`", PAGE)


def test_page_walks_through_the_files_of_the_executor() -> None:
    files = {Path(file).stem for file, _, _ in STEPS}
    assert files >= {"step", "grads", "lower", "execute", "enter", "layers", "leave"}
    assert PAGE.count(".py:") == len(STEPS)


@pytest.mark.parametrize(("file", "line", "name"), STEPS)
def test_page_names_the_line_of_a_function(file: str, line: str, name: str) -> None:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = [number for number, text in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b", text)]
    assert int(line) in found, f"{file}: {name} is at {found}"
