"""A lazy package imports its names at first use, and a submodule does not hide the function of its name."""

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.abc import InspectLoader
from pathlib import Path

import pytest
import trellax.plan

PACKAGE = """
from typing import TYPE_CHECKING
from trellax.meshes.lazy import make_lazy
if TYPE_CHECKING:
    from .apple import apple
    from .pear import Pear as Fruit
__all__ = ["Fruit", "apple"]
make_lazy(__name__)
"""


@pytest.fixture
def orchard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a package with a function of its module's name, and a class under another name."""
    yield from _plant(tmp_path / "lazy_orchard", monkeypatch)


def _plant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "apple.py").write_text("def apple(): return 'red'\n")
    (folder / "pear.py").write_text("class Pear: pass\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder.name
    for name in [name for name in sys.modules if name.startswith(folder.name)]:
        del sys.modules[name]


def test_names_are_imported_at_first_use(orchard: str) -> None:
    package = import_module(orchard)
    assert f"{orchard}.pear" not in sys.modules
    assert package.Fruit.__name__ == "Pear"
    assert f"{orchard}.pear" in sys.modules
    assert {"Fruit", "apple"} <= set(dir(package))


def test_names_are_found_where_pytest_rewrites_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As it does with the package of its plugin where trellax is installed with `pip install -e`.
    pytest.register_assert_rewrite("lazy_rewritten")
    for name in _plant(tmp_path / "lazy_rewritten", monkeypatch):
        package = import_module(name)
        assert package.__spec__ is not None
        assert not isinstance(package.__spec__.loader, InspectLoader)
        assert package.Fruit.__name__ == "Pear"


def test_a_function_with_the_name_of_its_module_is_the_function(orchard: str) -> None:
    import_module(f"{orchard}.apple")
    package = import_module(orchard)
    assert package.apple() == "red"


def test_a_private_name_is_not_an_attribute() -> None:
    with pytest.raises(AttributeError, match=r"module 'trellax.plan' has no attribute 'Polan'"):
        _ = trellax.plan.Polan  # type: ignore[attr-defined]


def test_importing_every_room_imports_no_jax() -> None:
    rooms = sorted(file.parent.name for file in (Path(__file__).parents[2] / ".src" / "trellax").glob("*/__init__.py"))
    code = f"import sys, {', '.join(f'trellax.{room}' for room in rooms)}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
