"""The pages of the documentation and their code blocks, with snippets put in as mkdocs does."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAB_NOTES = sorted((DOCS / "lab-notes").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
"""What a reader may copy from."""

_SNIPPETS = (ROOT / "examples", DOCS, ROOT / "tests" / "golden")
"""As `base_path` in mkdocs.yml."""

_FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?[^\n]*\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
_SNIPPET = re.compile(r'^--8<-- "([\w./-]+?)(?::(\w+))?"$', flags=re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: where it is, its language and title, its text, and the files that it includes."""

    page: str
    line: int
    language: str
    title: str
    text: str
    files: tuple[Path, ...]
    is_snippet: bool
    """Whether there is nothing in it but what it includes."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in their order."""
    return list(_read_blocks(page))


def _read_blocks(page: Path) -> Iterator[Block]:
    source = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(source):
        indent, language, title, raw = match.groups()
        text = re.sub(rf"^{indent}", "", raw, flags=re.MULTILINE)
        yield Block(
            page=name_of(page),
            line=source[: match.start()].count("\n") + 1,
            language=language,
            title=title or "",
            text=_SNIPPET.sub(lambda found: _include(found[1], found[2]), text),
            files=tuple(_find(found[0]) for found in _SNIPPET.findall(text)),
            is_snippet=not _SNIPPET.sub("", text).strip(),
        )


def _find(name: str) -> Path:
    (file,) = (folder / name for folder in _SNIPPETS if (folder / name).is_file())
    return file


def _include(name: str, section: str | None) -> str:
    text = _find(name).read_text(encoding="utf-8")
    if section:
        marks = rf"# --8<-- \[start:{section}\]\n(.*?)# --8<-- \[end:{section}\]"
        (text,) = re.findall(marks, text, flags=re.DOTALL)
    return re.sub(r"# --8<-- \[.*\]\n", "", text).rstrip("\n")


def commands_of(block: Block) -> list[str]:
    """Return the lines of a block that call trellax, without the remarks behind them."""
    lines = block.text.splitlines() if block.language == "bash" else []
    return [line.partition("  #")[0].rstrip() for line in lines if line.startswith("trellax ")]


def run_as_user(words: list[str], *, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a person would, without what conftest.py sets for the tests but its compilation cache.

    `variables` are of the environment.
    """
    for_tests = {"JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS", "NPROC"}
    env = {name: value for name, value in os.environ.items() if name not in for_tests}
    env |= variables | {"PYTHONPATH": str(ROOT / ".src")}
    return subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
