"""Names of targets, the hardware of their descriptions, and the errors of wrong ones."""

import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from trellax.meshes import TargetError
from trellax.programs import Target, hardware_from_description, open_target
from trellax.programs import targets as targets_module
from trellax.programs.targets import choose_gpu

# Shortened from XLA's own; the names are those of the CUDA plugin of jax 0.12.0.
KNOWN = ["a100-80gb-pcie", "a100-sxm4-40gb", "a100-sxm4-80gb", "h100-80gb-hbm3", "h100-80gb-hbm3-mig-1g.10gb"]
KNOWN += ["h100-pcie", "h200-141gb-hbm3e"]
DESCRIPTION = """
gpu_device_info {
  core_count: 100
  fpus_per_core: 128
  memory_bandwidth: 2000000000000
  clock_rate_ghz: 2.0
  device_memory_size: 80000000000
  cuda_compute_capability {
    major: 9
  }
  scalar_unit_description {
    rate_infos {
      key: 11
      value {
        clock_rate_ghz: 2.0
        units_per_core: 128
        ops_per_clock: 1
      }
    }
  }
  matrix_unit_description {
    rate_infos {
      key: 16
      value {
        clock_rate_ghz: 1.5
        units_per_core: 4
        ops_per_clock: 512
      }
    }
    rate_infos {
      key: 20
      value {
        clock_rate_ghz: 1.5
        units_per_core: 4
        ops_per_clock: 1024
      }
    }
  }
  device_interconnect_info {
    active_links: 18
  }
}
platform_name: "CUDA"
device_description_str: "NVIDIA X1 80GB"
"""


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("cpu", Target(name="cpu")),
        ("h200:8", Target(name="h200", num_devices=8)),
        ("H100:64/8", Target(name="h100", num_devices=64, devices_per_node=8)),
        ("a100-80:16", Target(name="a100-80", num_devices=16)),
    ],
)
def test_targets_are_parsed(text: str, target: Target) -> None:
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("h100", "h100-80gb-hbm3"),
        ("h100-pcie", "h100-pcie"),
        ("a100-80", "a100-sxm4-80gb"),
        ("a100-40gb", "a100-sxm4-40gb"),
        ("a100-80gb-pcie", "a100-80gb-pcie"),
        ("h200", "h200-141gb-hbm3e"),
    ],
)
def test_short_names_stand_for_the_usual_module(name: str, chosen: str) -> None:
    assert choose_gpu(name, KNOWN) == chosen


MISTAKES: dict[str, Callable[[], object]] = {
    "syntax": lambda: Target.parse("h200=8"),
    "too_many": lambda: Target.parse("h200:2048"),
    "uneven_nodes": lambda: Target.parse("h100:60/8"),
    "unknown": lambda: choose_gpu("h300", KNOWN),
    "ambiguous": lambda: choose_gpu("a100", KNOWN),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_error_of_a_wrong_target_gives_a_right_one(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TargetError) as caught:
        MISTAKES[name]()
    golden(f"errors/programs/target_{name}.txt", str(caught.value))


def test_error_without_the_plugin_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setattr(targets_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError) as caught:
        open_target(Target.parse("h200:8"), num_devices=8)
    golden("errors/programs/target_no_plugin.txt", str(caught.value))


def test_error_of_a_plugin_without_descriptions_names_a_version_with_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    # That of jax 0.10.2 is such a one.
    library = tmp_path / "xla_cuda_plugin.so"
    library.write_bytes(b"\0no descriptions\0")
    monkeypatch.setattr(targets_module, "_find_plugin", lambda: library)
    with pytest.raises(TargetError) as caught:
        open_target(Target.parse("h200:8"), num_devices=8)
    golden("errors/programs/target_no_descriptions.txt", str(caught.value).replace(jax.__version__, "VERSION"))


def test_hardware_has_the_numbers_of_the_description() -> None:
    hardware = hardware_from_description(DESCRIPTION)
    assert hardware.name == "NVIDIA X1 80GB"
    assert hardware.memory_bytes == 80 * 10**9
    assert hardware.memory_bytes_per_s == 2e12
    # A multiply-add is two flops: 100 cores x 4 units x 512 a clock x 1.5 GHz.
    assert hardware.matrix_peak("bf16") == 2 * 100 * 4 * 512 * 1.5e9
    assert hardware.vector_flops_per_s == 2 * 100 * 128 * 2e9
    assert hardware.link_bytes_per_s == 18 * 25e9
    assert hardware.compiler_base_bytes == 0.8 * 80e9
    # Eight bits, as HLO names them.
    assert hardware.matrix_peak("f8e4m3fn") == 2 * hardware.matrix_peak("bf16")


def test_a_type_without_matrix_units_runs_at_the_vector_peak() -> None:
    hardware = hardware_from_description(DESCRIPTION)
    assert hardware.matrix_peak("f64") == hardware.vector_flops_per_s


def test_fake_devices_share_this_machine() -> None:
    machine = open_target(Target.parse("cpu"), num_devices=len(jax.devices()))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine.hardware.memory_bytes == total // len(jax.devices())
    assert machine.hardware.matrix_peak("f32") > 0
    assert machine.hardware.memory_bytes_per_s > 0
