"""The package as a whole: `import trellax`, `python -m trellax`, and what a build takes and refuses."""

import importlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trellax
from _pytest.config import _iter_rewritable_modules

ROOT = Path(__file__).parents[1]

# What hatch_build.py needs of hatchling, which only a build has installed.
HATCHLING = """
class BuildHookInterface:
    def __init__(self, root, app):
        self.root, self.app = root, app
"""


class App:
    """Hatchling's application, which prints a message and ends."""

    def abort(self, message: str) -> None:
        raise SystemExit(message)


def run_python(*words: str, folder: Path) -> str:
    return subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_version_is_that_of_the_installation() -> None:
    assert trellax.__version__ == importlib.metadata.version("trellax")


def test_any_other_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'trellax' has no attribute 'mesh'"):
        _ = importlib.import_module("trellax").mesh


def test_importing_trellax_imports_nothing_else(tmp_path: Path) -> None:
    code = "import sys; before = {*sys.modules}; import trellax; print({*sys.modules} - before)"
    assert run_python("-c", code, folder=tmp_path) == "{'trellax'}\n"


def test_python_dash_m_is_the_command(tmp_path: Path) -> None:
    assert run_python("-m", "trellax", "--version", folder=tmp_path) == f"trellax {trellax.__version__}\n"


def test_a_folder_of_the_name_hides_nothing(tmp_path: Path) -> None:
    """Where Python is started beside a clone, which is a folder named trellax with folders of its own in it."""
    (tmp_path / "trellax" / "meshes").mkdir(parents=True)
    (tmp_path / "trellax" / "meshes" / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    assert run_python("-c", "import trellax.meshes as m; print(m.MeshSpec())", folder=tmp_path)


def test_pytest_rewrites_no_module_of_a_user() -> None:
    """pytest rewrites the assertions of every top-level package in a wheel that has a plugin; ours is one."""
    files = [file.relative_to(ROOT / ".src").as_posix() for file in (ROOT / ".src" / "trellax").glob("**/*.py")]
    files += [f"trellax/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "train").glob("**/*.py")]
    assert {*_iter_rewritable_modules(files)} == {"trellax"}


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the build hook over an empty tree."""
    interface = tmp_path / "site" / "hatchling" / "builders" / "hooks" / "plugin" / "interface.py"
    interface.parent.mkdir(parents=True)
    interface.write_text(HATCHLING, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = tmp_path / "tree"
    (tree / ".src" / "trellax").mkdir(parents=True)
    for name in ("meshes", "train"):
        (tree / name).mkdir()
        (tree / name / "__init__.py").touch()
    return module.LinksHook(str(tree), App())


def test_a_tree_with_its_links_is_built(hook: Any) -> None:
    for name in ("meshes", "train"):
        (Path(hook.root) / ".src" / "trellax" / name).symlink_to(f"../../{name}")
    hook.initialize("standard", {})


def test_a_tree_with_copies_for_links_is_built(hook: Any) -> None:
    """As a source distribution has them."""
    for name in ("meshes", "train"):
        shutil.copytree(Path(hook.root) / name, Path(hook.root) / ".src" / "trellax" / name)
    hook.initialize("editable", {})


def test_a_tree_with_small_text_files_for_links_is_refused(hook: Any) -> None:
    """As from a ZIP that was unpacked by a tool without symbolic links, Python's own for one."""
    for name in ("meshes", "train"):
        (Path(hook.root) / ".src" / "trellax" / name).write_text(f"../../{name}", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        hook.initialize("standard", {})
    assert str(caught.value) == (
        f"trellax cannot be built from {hook.root}: the symbolic links of .src/trellax are broken (meshes, train). "
        "A ZIP unpacked without its links has small text files in their place.\n"
        "  Fix: use `git clone`, or install a wheel of trellax (docs/install.md)."
    )


def test_a_tree_that_lost_one_link_is_refused(hook: Any) -> None:
    (Path(hook.root) / ".src" / "trellax" / "meshes").symlink_to("../../meshes")
    with pytest.raises(SystemExit, match=r"are broken \(train\)"):
        hook.initialize("standard", {})


def test_pyproject_names_the_hook() -> None:
    assert "[tool.hatch.build.hooks.custom]\n" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
