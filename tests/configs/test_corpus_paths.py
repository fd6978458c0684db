"""Every file that `data.paths` names is found once, however links and globs lead to it; what is none is called so."""

import os
from pathlib import Path

import pytest
from trellax.configs.corpora.paths import find_files
from trellax.meshes import DataError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b/c.txt", "b/d/e.txt", "b/.hidden/f.txt", "run[1]/g.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    return tmp_path


GLOBS = {
    "*.txt": "a.txt",
    "**/*.txt": "a.txt b/c.txt b/d/e.txt run[1]/g.txt",
    "b/**": "b/c.txt b/d/e.txt",
    "b/**/**/*.txt": "b/c.txt b/d/e.txt",
    "**/d/**/*.txt": "b/d/e.txt b/d/up/c.txt",
    "run[1]/**/*.txt": "run[1]/g.txt",
    "[b]/*": "b/c.txt",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("start", ["", "/"])
@pytest.mark.parametrize("pattern", GLOBS)
def test_glob_finds_each_file_once_where_links_lead_in_circles(pattern: str, start: str, folder: Path) -> None:
    for place, above in (("b/up", "../b"), ("b/d/up", "../../b"), ("b/d/up2", "../d")):
        Path(place).symlink_to(above)
    Path("b/same.txt").symlink_to("c.txt")
    root = f"{folder}/" if start else ""
    assert find_files([root + pattern]) == [Path(root + name) for name in GLOBS[pattern].split()]


def test_folders_behind_links_are_read(folder: Path) -> None:
    Path("data").mkdir()
    Path("data/linked").symlink_to(folder / "b")
    assert find_files(["data/**/*.txt"]) == [Path("data/linked/c.txt"), Path("data/linked/d/e.txt")]


TWICE = [["*.txt", "*.txt"], ["a.txt", "b/../a.txt"], ["a.txt", "same.txt"], ["run[1]/../a.txt", "a.txt"]]


@pytest.mark.parametrize("paths", TWICE)
def test_path_that_is_given_again_is_refused_and_not_left_out(paths: list[str]) -> None:
    Path("same.txt").symlink_to("a.txt")
    with pytest.raises(DataError, match="more than once"):
        find_files(paths)


MISTAKES = {
    "pipe": "is a named pipe",
    "device": "is a device",
    "circle": "is a link that leads nowhere",
    "": "names no file",
    "x" * 5_000: "File name too long",
    "\0": "does not exist",
    "\ud800": "does not exist",
    "run[1]x*.txt": r"brackets themselves",
}


@pytest.mark.parametrize("path", MISTAKES)
def test_folder_pipe_or_device_is_named_in_the_error(path: str) -> None:
    os.mkfifo("pipe")
    Path("device").symlink_to("/dev/zero")
    Path("circle").symlink_to("circle")
    with pytest.raises(DataError, match=MISTAKES[path]):
        find_files([path])
