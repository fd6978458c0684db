"""The ground every test stands on: eight CPU devices, strict ranks, a compilation cache, golden files."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

# jax reads these when it is imported, and subprocess tests inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# Unoptimized machine code compiles a third faster, and these programs run for milliseconds. HLO passes are not touched.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("NPROC", "10")  # threads for eight devices that wait and two cores that work
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# What is printed is compared as a pipe gets it, whatever terminal the tests are run from.
for _name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
    os.environ.pop(_name, None)
# A cache for each process of pytest-xdist: jax writes entries in place, so another process could read half of one. The
# processes inherit what the first one sets, hence the second name.
_CACHES = os.environ.setdefault("TRELLAX_TEST_CACHES", str(ROOT / ".cache" / "jax"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_CACHES}/{os.environ.get('PYTEST_XDIST_WORKER', 'gw0')}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what compiles for GPUs where jax's plugin for them is not installed."""
    if item.get_closest_marker("cuda") and _plugin_is_missing():
        pytest.skip("needs the CUDA plugin: pip install 'trellax[cuda]'")


_QUICK = ("configs", "docs", "meshes", "plan", "schedules")
"""Folders of short tests: they come last, so that all processes of pytest-xdist end at about one time."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of `slow_cases.txt` as slow: siblings of cases that stay in `make test`, chosen by their time."""
    items.sort(key=lambda item: item.nodeid.startswith(tuple(f"tests/{folder}/" for folder in _QUICK)))
    slow = slow_cases()
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


def slow_cases() -> set[str]:
    """Return the cases of `slow_cases.txt` by their names in pytest."""
    lines = (ROOT / "tests" / "slow_cases.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


@cache
def _plugin_is_missing() -> bool:
    from trellax.meshes import TargetError
    from trellax.programs import list_gpus

    try:
        return not list_gpus()
    except TargetError:
        return True


@pytest.fixture
def golden() -> Callable[[str, str], None]:
    """Compare text with `tests/golden/<path>`; GOLDEN=1 (`make golden`) rewrites the file instead."""

    def compare(path: str, text: str) -> None:
        file = ROOT / "tests" / "golden" / path
        if os.environ.get("GOLDEN") == "1":
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        assert file.exists(), f"{file} is missing; `make golden` writes it"
        assert text.rstrip("\n") + "\n" == file.read_text(encoding="utf-8")

    return compare


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Any]:
    """Return a maker of configs: a bare config name and overrides as one text; the run folder is the test's own."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))

    def make(overrides: str = "", *, name: str = "tiny-llama") -> Any:
        from trellax.configs import load_config

        words = ["--run.folder", str(tmp_path / "runs"), "--data.source", "text", "--data.paths", str(corpus)]
        return load_config(name, [*words, *overrides.split()])

    return make
