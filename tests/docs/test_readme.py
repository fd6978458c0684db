"""The README is short, its pictures are what the code draws, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
from trellax.commands import cli

from .pages import DOCS, PAGES, ROOT, blocks_of, name_of

README = ROOT / "README.md"
MOST_LINES = 160
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]


def text_blocks(page: Path, containing: str) -> list[list[str]]:
    return [
        block.text.splitlines() for block in blocks_of(page) if block.language == "text" and containing in block.text
    ]


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_schedule_in_the_readme_is_what_its_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = text_blocks(README, "4 ranks")
    command = "schedule 1f1b --ranks 4 --microbatches 8"
    assert f"`trellax {command}`" in README.read_text(encoding="utf-8")
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out.splitlines() == block


@pytest.mark.parametrize("page", [page for page in PAGES if text_blocks(page, "mesh      data=2")], ids=name_of)
def test_excerpt_of_describe_is_what_describe_prints(page: Path) -> None:
    golden = (ROOT / "tests" / "golden" / "describe_quickstart.txt").read_text(encoding="utf-8").splitlines()
    (block,) = text_blocks(page, "mesh      data=2")
    assert [line for line in block if line not in golden] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_in_the_documents_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    bash = [block.text for page in PAGES for block in blocks_of(page) if block.language == "bash"]
    inline = [found for path in {*PAGES, *DOCUMENTS} for found in re.findall(r"`(make [^`]*)`", path.read_text())]
    named = {name for text in [*bash, *inline] for name in re.findall(r"^make ([a-z][\w-]*)", text, flags=re.MULTILINE)}
    assert named - {*targets} == set()


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES if page.is_relative_to(DOCS)}
    assert {page for page in pages if f" {page}\n" not in nav} == set()
