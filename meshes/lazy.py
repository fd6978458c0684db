"""Packages whose public names are imported when somebody asks for them, so that `trellax --help` needs no jax.

A package writes its imports once, under `if TYPE_CHECKING:`, where type checkers read them, and then calls `make_lazy`,
which reads the same lines (PEP 562, by the class of the module).
"""

import ast
import sys
from functools import cache
from importlib import import_module
from importlib.abc import InspectLoader
from types import ModuleType


def make_lazy(package: str) -> None:
    """Let a package import each name of its `__all__` at first use, from where its type-checking imports say."""
    sys.modules[package].__class__ = _LazyPackage


class _LazyPackage(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name not in self.__dict__.get("__all__", ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_read_imports(self.__name__)[name], self.__name__), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Importing a submodule sets it on its package, and a public function may have its name: `pipeline.lower`.
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("__all__", ())):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["__all__"]})


@cache
def _read_imports(package: str) -> dict[str, str]:
    """The module of each name that a package imports under `if TYPE_CHECKING:`."""
    found: dict[str, str] = {}
    for node in ast.parse(_read_source(package)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    found |= {alias.asname or alias.name: f"{'.' * line.level}{line.module}" for alias in line.names}
    return found


def _read_source(package: str) -> str:
    spec = sys.modules[package].__spec__
    assert spec is not None
    assert isinstance(spec.loader, InspectLoader)
    return spec.loader.get_source(package) or ""
