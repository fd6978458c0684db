"""Every code block of README.md and of the site runs as printed, or is marked in its source as one that cannot.

- `python`: a script of its own, in an empty folder, or parts of a file in examples/ or docs/lab-notes/, which run
  whole.
- `bash`: lines that begin with `trellax` run in their order, a page a folder; a block with a title is for another
  machine than this, and is only parsed.
- `text`, `toml`, `yaml`, `csv`, `dockerfile`: nothing runs; `text` with the title "output" is what the Python block
  before it prints.
"""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from .pages import EXAMPLES, LAB_NOTES, PAGES, ROOT, Block, blocks_of, name_of, run_as_user

BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SCRIPTS = [block for block in BLOCKS if block.language == "python" and not block.is_snippet]
LANGUAGES = {"python", "bash", "text", "toml", "yaml", "csv", "dockerfile"}

FAST = {"README.md", "docs/concepts/axes.md"}
"""Pages whose scripts run in `make test`; the others take as long and run in `make slow`."""

_IMPORT = re.compile(r"from (trellax(?:[.]\w+)*) import ([(]?[\w ]+(?:,\s*[\w ]+)*)")
# Digits that another version of jax may round in another way.
_ROUNDED = re.compile(r"\d\.?\d*e-\d+")


def slow_unless(is_fast: bool) -> tuple[pytest.MarkDecorator, ...]:
    return () if is_fast else (pytest.mark.slow,)


def outputs_after(page: Path) -> dict[str, list[str]]:
    """Return the lines of outputs that a page prints, by the example or the line of the script that they are of."""
    found: dict[str, list[str]] = {}
    source = ""
    for block in blocks_of(page):
        if block.language == "python":
            source = block.files[0].name if block.is_snippet else str(block)
        if block.title == "output":
            found.setdefault(source, []).extend(line for line in block.text.splitlines() if line.strip())
    return found


OUTPUTS = {source: lines for page in PAGES for source, lines in outputs_after(page).items()}


def missing_from(printed: str, wanted: list[str]) -> list[str]:
    lines = {_ROUNDED.sub("~", line) for line in printed.splitlines()}
    return [line for line in wanted if _ROUNDED.sub("~", line) not in lines]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_has_a_language_that_says_what_becomes_of_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, flags=re.MULTILINE)) == 2 * len(blocks_of(page))
    assert [str(block) for block in blocks_of(page) if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_import_on_a_page_finds_its_names(page: Path) -> None:
    """In prose too, where nothing runs it."""
    named = [
        (module, name.strip().split(" as ")[0])
        for module, names in _IMPORT.findall(page.read_text(encoding="utf-8"))
        for name in names.replace("(", "").split(",")
    ]
    assert [pair for pair in named if pair[1] and not hasattr(import_module(pair[0]), pair[1])] == []


def test_snippets_are_of_files_that_run() -> None:
    assert [str(block) for block in BLOCKS if re.search(r"8 ?<", block.text) and not block.title] == []
    others = [str(b) for b in BLOCKS if b.language == "python" and not {*b.files} <= {*EXAMPLES, *LAB_NOTES}]
    assert others == []


def test_toml_is_toml() -> None:
    for block in BLOCKS:
        if block.language == "toml":
            assert tomllib.loads(block.text), str(block)


@pytest.mark.parametrize(
    "block", [pytest.param(block, id=str(block), marks=slow_unless(block.page in FAST)) for block in SCRIPTS]
)
def test_script_of_a_page_runs(block: Block, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(block.text, encoding="utf-8")
    done = run_as_user(["script.py"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert missing_from(done.stdout, OUTPUTS.get(str(block), [])) == []


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, id=file.stem, marks=slow_unless(file.stem in ("own_schedule", "which_mesh")))
        for file in EXAMPLES
    ],
)
def test_example_runs_and_prints_what_its_tutorial_says(file: Path, tmp_path: Path) -> None:
    done = run_as_user([str(file)], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert missing_from(done.stdout, OUTPUTS.get(file.name, [])) == []


def test_examples_are_short_and_each_is_in_a_tutorial() -> None:
    tutorials = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "tutorials")
    assert [file.name for file in EXAMPLES if f"examples/{file.name}" not in tutorials] == []
    assert [file.name for file in EXAMPLES if len(file.read_text(encoding="utf-8").splitlines()) > 80] == []


def test_files_named_in_code_exist() -> None:
    named = {
        (name_of(page), name)
        for page in PAGES
        for name in re.findall(
            r"`(?:python )?([\w./-]+/[\w.-]+\.(?:py|toml|md|txt|sh|yaml))(?::\d+)?`", page.read_text()
        )
    }
    made_by_readers = ("runs/", "models/", "notes/")
    assert [
        pair for pair in sorted(named) if not (ROOT / pair[1]).exists() and not pair[1].startswith(made_by_readers)
    ] == []
