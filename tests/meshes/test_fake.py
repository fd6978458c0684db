"""Fake devices can be asked for once, before jax starts; a process of its own shows each case."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.meshes import MeshError, use_fake_devices

SOURCE = str(Path(__file__).parents[2] / ".src")
START = "import jax; from trellax.meshes import MeshError, use_fake_devices\n"


def run(script: str) -> str:
    """What a fresh Python prints, without the eight devices of the tests."""
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", START + script],
        env=clean | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_line_gives_as_many_devices_as_asked() -> None:
    assert run("use_fake_devices(6); print(len(jax.devices()), jax.devices()[0].platform)") == "6 cpu"


def test_asking_again_for_the_same_number_is_allowed() -> None:
    assert run("use_fake_devices(3); jax.numpy.ones(2); use_fake_devices(3); print(len(jax.devices()))") == "3"


def test_asking_after_jax_has_started_is_refused(golden: Callable[[str, str], None]) -> None:
    started = "jax.config.update('jax_platforms', 'cpu'); jax.numpy.ones(2)\n"
    said = run(started + "try: use_fake_devices(8)\nexcept MeshError as error: print(error)")
    golden("errors/meshes/fake_after_start.txt", said)


@pytest.mark.parametrize("num_devices", [0, -1])
def test_number_that_is_not_positive_is_refused(num_devices: int) -> None:
    with pytest.raises(MeshError, match=f"{num_devices} is not a number of devices"):
        use_fake_devices(num_devices)


def test_number_that_would_take_minutes_is_refused() -> None:
    with pytest.raises(MeshError, match="fake devices: 1000000 are too many"):
        use_fake_devices(1_000_000)
