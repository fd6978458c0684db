"""A pytest plugin for tests of sharded code: fake devices for the whole session, from one flag or one line of config.

    # pyproject.toml
    [tool.pytest.ini_options]
    fake_devices = "8"

    # test_step.py
    def test_mesh(fake_devices):
        mesh = build_mesh(MeshSpec(data=2, tensor=4), devices=fake_devices)

pytest loads this file in every environment where trellax is installed, so it imports jax only when a test asks for
devices. The assertions about compiled programs need no fixture: import them from `trellax.programs`.
"""

import os
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from ..meshes.errors import MeshError
from ..meshes.spec import MOST_FAKE_DEVICES

DEFAULT_DEVICES = 8
"""Number of devices that the fixture makes where neither the flag nor the ini option is set."""

_HINT = "set `fake_devices = {count}` in pytest's configuration, or run `pytest --fake-devices {count}`."


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag `--fake-devices` and the ini option `fake_devices`."""
    group = parser.getgroup("trellax")
    about = "make jax see N CPU devices in the whole session"
    group.addoption("--fake-devices", type=int, metavar="N", help=f"{about}; overrides the ini option fake_devices.")
    parser.addini("fake_devices", f"{about}; the fixture fake_devices uses {DEFAULT_DEVICES} if this is not set.")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Set jax's variables before a conftest can import jax; subprocesses and workers of pytest-xdist inherit them."""
    count = read_count(early_config)
    if count is None:
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
    # As in meshes/fake.py: a thread for each device that waits for the others, and one for each core.
    os.environ.setdefault("NPROC", str(count - 1 + (os.cpu_count() or 1)))
    if "jax" in sys.modules:
        # jax read its variables when another plugin imported it; until it has started, its settings can be changed.
        _start_devices(count)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Name the number of fake devices at the top of pytest's output."""
    count = read_count(config)
    return None if count is None else f"trellax: {count} fake devices"


@pytest.fixture(scope="session")
def fake_devices(pytestconfig: pytest.Config) -> list[Any]:
    """CPU devices on which a test builds its meshes: as many as `--fake-devices` or the ini option say, or 8.

    Without flag and ini option, jax is started with 8 CPU devices when the first test uses this fixture.

    Raises:
        MeshError: jax has already started with fewer devices, or with devices other than CPUs.
    """
    return _start_devices(read_count(pytestconfig) or DEFAULT_DEVICES)


def read_count(config: pytest.Config) -> int | None:
    """Return the number of devices from the flag or else from the ini option, None if neither is set.

    Raises:
        pytest.UsageError: it is not a whole number from 1 to 4096.
    """
    flag = config.known_args_namespace.fake_devices
    given = str(config.getini("fake_devices") if flag is None else flag).strip()
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and 1 <= int(given) <= MOST_FAKE_DEVICES):
        name = "the ini option fake_devices" if flag is None else "--fake-devices"
        raise pytest.UsageError(
            f"{name} is {given!r}, not a number of devices from 1 to {MOST_FAKE_DEVICES}.\n  Fix: ask for 8, say."
        )
    return int(given)


def _start_devices(count: int) -> list[Any]:
    """Start jax with this many CPU devices, or return the first of those that it has started with."""
    import jax

    from ..meshes.fake import use_fake_devices

    try:
        use_fake_devices(count)
    except MeshError:
        # jax has already started: its devices are used if they are CPUs and enough.
        visible = jax.devices()
        if len(visible) < count or visible[0].platform != "cpu":
            raise MeshError(
                f"fake devices: a test needs {count}, but jax has already started with {_describe(visible)}.",
                fix=_HINT.format(count=count),
            ) from None
    return list(jax.devices()[:count])


def _describe(devices: Iterable[Any]) -> str:
    kinds = [device.platform for device in devices]
    return f"{len(kinds)} {kinds[0]} device{'s' if len(kinds) > 1 else ''}"
