"""A project of a user's, outside of the repository, passes type checkers; its mistakes are reported line by line.

The project sees trellax as an installed package: the checkers look for it on the path of an interpreter, where the file
`py.typed` says that its types count. `assert_type` in the project fails where a public name has no type.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trellax

HERE = Path(__file__).parent
PACKAGES = Path(str(trellax.__file__)).parents[1]

Checker = Callable[[Path], set[tuple[str, int]]]
"""A function from a project to the files and lines that have an error."""


def test_package_says_that_its_types_count() -> None:
    assert (PACKAGES / "trellax" / "py.typed").is_file()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HERE / "project", tmp_path / "project"))


def run_checker(words: Sequence[str], folder: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(PACKAGES), "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout


def pyrefly_errors(folder: Path) -> set[tuple[str, int]]:
    pyrefly = Path(sys.executable).with_name("pyrefly")
    if not pyrefly.exists():
        pytest.skip("needs pyrefly, of the extra `dev`")
    (folder / "pyrefly.toml").write_text('project-includes = ["**/*.py"]\n')
    words = [str(pyrefly), "check", "--python-interpreter-path", sys.executable, "--output-format", "json"]
    found = json.loads(run_checker(words, folder))["errors"]
    return {(Path(one["path"]).name, one["line"]) for one in found if one["severity"] == "error"}


def pyright_errors(folder: Path) -> set[tuple[str, int]]:
    pyright = os.environ.get("PYRIGHT") or shutil.which("pyright", path=str(Path(sys.executable).parent))
    if not pyright:
        pytest.skip("needs pyright, beside this interpreter or named by PYRIGHT")
    (folder / "pyrightconfig.json").write_text('{"include": ["."], "typeCheckingMode": "standard"}')
    found = json.loads(run_checker([pyright, "--pythonpath", sys.executable, "--outputjson"], folder))
    return {
        (Path(one["file"]).name, one["range"]["start"]["line"] + 1)
        for one in found["generalDiagnostics"]
        if one["severity"] == "error"
    }


CHECKERS = [pyrefly_errors, pytest.param(pyright_errors, marks=pytest.mark.slow)]


@pytest.mark.parametrize("errors", CHECKERS)
def test_project_has_no_error(errors: Checker, project: Path) -> None:
    assert errors(project) == set()


@pytest.mark.parametrize("errors", CHECKERS)
def test_every_mistake_is_reported_where_it_is(errors: Checker, project: Path) -> None:
    text = (HERE / "wrong.py.txt").read_text()
    (project / "wrong.py").write_text(text)
    lines = text.splitlines()
    wanted = {("wrong.py", number + 2) for number, line in enumerate(lines) if re.match("# ", line)}
    assert len(wanted) == 9
    assert errors(project) == wanted
