"""Import the public names of a package when they are first used, so that `trellax --help` does not import jax.

A package lists its imports once, under `if TYPE_CHECKING:`, where type checkers read them, and calls `make_lazy`. That
reads the same lines when a name is first asked for, and imports it then (PEP 562, by the class of the module).
"""

import ast
import sys
from functools import cache
from importlib import import_module
from importlib.abc import InspectLoader
from pathlib import Path
from types import ModuleType


def make_lazy(package: str) -> None:
    """Make each name in the `__all__` of a package import itself at first use.

    Args:
        package: the `__name__` of the package that calls this.
    """
    sys.modules[package].__class__ = _LazyPackage


class _LazyPackage(ModuleType):
    """A package that imports the names of its `__all__` at first use."""

    def __getattr__(self, name: str) -> object:
        if name not in self.__dict__.get("__all__", ()):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, own_name = _read_imports(self.__name__)[name]
        value = getattr(import_module(module, self.__name__), own_name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Python sets an imported submodule on its package. Where a public function has the name of its module, as in
        # `from .lower import lower`, that must not hide the function.
        if not (isinstance(value, ModuleType) and name in self.__dict__.get("__all__", ())):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__dict__["__all__"]})


@cache
def _read_imports(package: str) -> dict[str, tuple[str, str]]:
    """Return for each name that a package imports under `if TYPE_CHECKING:` its module and its name there."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(_read_source(package)).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                if isinstance(line, ast.ImportFrom):
                    module = f"{'.' * line.level}{line.module}"
                    found |= {alias.asname or alias.name: (module, alias.name) for alias in line.names}
    return found


def _read_source(package: str) -> str:
    spec = sys.modules[package].__spec__
    assert spec is not None
    if isinstance(spec.loader, InspectLoader):
        return spec.loader.get_source(package) or ""
    # pytest's loader, which rewrites the assertions of a plugin's package: it gives no source, but its file is known.
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
