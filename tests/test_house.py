"""The house rules that no linter knows: sizes of rooms, files and functions, circles, names of machines."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ROOMS = sorted(file.parent.name for file in (ROOT / ".src" / "trellax").glob("*/__init__.py"))
FOLDERS = [*ROOMS, "benchmarks", "docs", "examples", "tests", ".ci"]

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 40
MAX_FLAT_FILES = 22
MAX_SHARE_OF_LINES = 0.2

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp|mnt|opt)/\w")
REGISTRY = re.compile(r"pypi[.]|pythonhosted[.]|index[-]url|artifactor[y]|[/@]npm[.]")


def files_of(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported_by(path: Path) -> set[str]:
    """Files that a file imports, for types alone and inside of functions too; the names of a room belong to no file."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = [*path.relative_to(ROOT).parts[: -node.level], *(node.module or "").split(".")]
            base = ROOT.joinpath(*filter(None, parts))
            named = [base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)]
            found |= {module_of(file) for file in named if file.is_file()}
    return found


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return the modules that are left when all that import none of those left are taken away, both ways."""
    left = dict(imports)
    while True:
        used = set().union(*left.values()) if left else set()
        ends = {name for name in left if not left[name] & left.keys() or name not in used}
        if not ends:
            return sorted(left)
        left = {name: left[name] for name in left if name not in ends}


PYTHON = [path for path in files_of(*ROOMS, "benchmarks", "docs", "examples", "tests") if path.suffix == ".py"]
TEXTS = [*(path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"), *files_of(*FOLDERS)]


def test_no_file_is_long() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PYTHON}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    long = {
        f"{name_of(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in PYTHON
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_cases_left_to_the_slow_suite_exist() -> None:
    lines = (ROOT / "tests" / "slow_cases.txt").read_text(encoding="utf-8").splitlines()
    cases = [re.split(r"::|\[", line)[:2] for line in lines if line and not line.startswith("#")]
    assert [case for case in cases if f"def {case[1]}(" not in (ROOT / case[0]).read_text(encoding="utf-8")] == []


def test_no_file_names_a_machine_or_a_package_registry() -> None:
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in TEXTS
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1)
        if MACHINE_PATH.search(line) or REGISTRY.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "see /" + "home/me/x",
        "cd /" + "work/main",
        '"/' + 'tmp/x"',
        "https://py" + "pi.org/simple",
        "--index" + "-url=x",
    ],
)
def test_machine_paths_and_registries_are_recognised(line: str) -> None:
    assert MACHINE_PATH.search(line) or REGISTRY.search(line)


def test_no_folder_has_many_files() -> None:
    folders = [folder for room in ROOMS for folder in [ROOT / room, *(ROOT / room).rglob("*/")]]
    counts = {
        name_of(folder): len([file for file in folder.glob("*.py") if file.stem != "__init__"]) for folder in folders
    }
    assert {name: count for name, count in counts.items() if count > MAX_FLAT_FILES} == {}


def test_the_types_of_every_room_are_checked() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(ROOMS) - set(config["tool"]["pyrefly"]["project-includes"]) == set()


def test_no_room_holds_more_than_a_fifth_of_the_lines() -> None:
    lines = {room: sum(count_lines(file) for file in files_of(room) if file.suffix == ".py") for room in ROOMS}
    total = sum(lines.values())
    assert {room: count / total for room, count in lines.items() if count > MAX_SHARE_OF_LINES * total} == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    found = find_circle({module_of(file): imported_by(file) for file in PYTHON if file.parts[len(ROOT.parts)] in ROOMS})
    assert found == []


@pytest.mark.parametrize(
    ("imports", "circle"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}}, ["a", "b", "c"]),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c"]),
    ],
)
def test_circles_are_found(imports: dict[str, set[str]], circle: list[str]) -> None:
    assert find_circle(imports) == circle
