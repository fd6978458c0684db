"""The public names of every package are frozen in a golden file, and each one says what it is."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_NAMES = 25
PACKAGES = [
    "meshes",
    "layers",
    "pipeline",
    "schedules",
    "programs",
    "plan",
    "hub",
    "configs",
    "train",
    "serve",
    "commands",
]


def exported(package: str) -> list[str]:
    """Read `__all__` without importing: a name's package need not be importable on this machine."""
    for node in parse(ROOT / package / "__init__.py").body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return ast.literal_eval(node.value)
    return []


# What a layer is told and returns is defined where layers are, and public where functions of a pipeline use it.
_ELSEWHERE = {"pipeline": [ROOT / "layers" / "own" / "protocol.py"]}


def documented(package: str) -> set[str]:
    """Names of the package's files, also in folders inside, that have a docstring; constants have theirs below."""
    found = set()
    for file in [*(ROOT / package).rglob("*.py"), *_ELSEWHERE.get(package, [])]:
        body = parse(file).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                found.add(node.name)
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(ast.unparse(target) for target in targets)
    return found


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_public_names_are_frozen(golden: Callable[[str, str], None]) -> None:
    lines = [f"trellax.{package.replace('/', '.')}.{name}" for package in PACKAGES for name in exported(package)]
    golden("public_names.txt", "\n".join(lines))


def test_a_name_has_one_home() -> None:
    names = [name for package in PACKAGES for name in exported(package)]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_few_public_names(package: str) -> None:
    assert len(exported(package)) <= MAX_NAMES


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package: str) -> None:
    assert set(exported(package)) - documented(package) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_why_it_exists(package: str) -> None:
    assert ast.get_docstring(parse(ROOT / package / "__init__.py"))
