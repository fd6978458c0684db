"""The pytest plugin works in a pytest process of its own, in a folder without our conftest."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parents[2] / ".src")
PLUGIN = "trellax.programs.pytest_plugin"
OURS = ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")

Run = Callable[..., subprocess.CompletedProcess[str]]

COUNTS = """
import jax

def test_devices(fake_devices):
    assert [device.platform for device in fake_devices] == ["cpu"] * len(fake_devices)
    print("devices", len(fake_devices), "of", len(jax.devices()))
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run pytest with the plugin on some files, without the plugins that happen to be installed."""

    def run(files: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        clean = {name: value for name, value in os.environ.items() if name not in OURS}
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", PLUGIN, *words],
            cwd=tmp_path,
            env=clean | {"PYTHONPATH": SOURCE, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("ini", "words", "found"),
    [
        ("[pytest]\nfake_devices = 4\n", (), "devices 4 of 4"),
        ("[pytest]\nfake_devices = 4\n", ("--fake-devices", "6"), "devices 6 of 6"),
        ("[pytest]\n", (), "devices 8 of 8"),
    ],
    ids=["ini", "flag", "neither"],
)
def test_number_of_devices_comes_from_the_flag_then_from_the_ini(
    run: Run, ini: str, words: tuple[str, ...], found: str
) -> None:
    done = run({"pytest.ini": ini, "test_devices.py": COUNTS}, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found in done.stdout


def test_option_holds_where_a_conftest_starts_jax(run: Run) -> None:
    files = {"conftest.py": "import jax\nprint('started with', jax.device_count())\n", "test_devices.py": COUNTS}
    done = run(files, "--fake-devices", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "started with 3" in done.stdout


def test_fewer_devices_than_asked_for_are_an_error_with_its_fix(run: Run, golden: Callable[[str, str], None]) -> None:
    starts = "import jax\njax.config.update('jax_platforms', 'cpu')\njax.numpy.ones(2)\n"
    done = run({"conftest.py": starts, "test_devices.py": COUNTS})
    assert done.returncode == 1
    lines = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    golden("errors/programs/plugin_started.txt", "\n".join(lines))


def test_more_devices_than_asked_for_are_accepted(run: Run) -> None:
    starts = "from trellax.meshes import use_fake_devices\nuse_fake_devices(10)\n"
    done = run({"conftest.py": starts, "test_devices.py": COUNTS})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "devices 8 of 10" in done.stdout


@pytest.mark.parametrize("count", ["0", "many", "5000"])
def test_text_that_is_no_number_of_devices_is_a_usage_error(run: Run, count: str) -> None:
    done = run({"pytest.ini": f"[pytest]\nfake_devices = {count}\n", "test_nothing.py": "def test_nothing(): pass\n"})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"the ini option fake_devices is '{count}'" in done.stderr


def test_plugin_imports_jax_only_for_devices(run: Run) -> None:
    check = "import sys\ndef test_imports():\n    assert {'jax', 'numpy', 'flax'} & sys.modules.keys() == set()\n"
    done = run({"test_imports.py": check})
    assert done.returncode == 0, done.stdout + done.stderr


def test_page_of_the_documentation_runs_as_printed(run: Run) -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "pytest.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"^```(?:toml|python)\n# ([\w.]+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL))
    assert set(files) == {"pyproject.toml", "test_step.py", "test_costs.py", "test_compilations.py"}
    done = run(files)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
