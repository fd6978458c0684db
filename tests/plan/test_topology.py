"""Machines by name, from a file, and the mistakes in both."""

from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.meshes import TargetError
from trellax.plan.topology import find_accelerator, read_topology

MISTAKES = {"unknown": "h10x8", "uneven": "h100x12/8", "spelling": "8 of h100", "no_file": "nowhere.toml"}


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("h100", (1, 1, 1)),
        ("h100x8", (8, 8, 1)),
        ("h100x64/8", (64, 8, 8)),
        ("a100x16", (16, 8, 2)),
        ("v100x4/2", (4, 2, 2)),
    ],
)
def test_name_says_devices_and_nodes(text: str, sizes: tuple[int, int, int]) -> None:
    topology = read_topology(text)
    assert (topology.num_devices, topology.devices_per_node, topology.num_nodes) == sizes


@pytest.mark.parametrize(
    "name",
    ["V100", "A100", "H100", "H200", "B200", "GB200", "RTX-4090", "L40S", "MI300X", "TPU-v4", "TPU-v5e", "TPU-v5p"],
)
def test_hardware_of_the_list_is_known_with_a_source(name: str) -> None:
    accelerator = find_accelerator(name)
    assert accelerator.source
    assert accelerator.peak_flops_per_s("bfloat16") > accelerator.memory_bytes_per_s


def test_own_machine_is_a_known_one_with_figures_changed(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('accelerator = "h100"\ndevices = 16\ndevices_per_node = 4\nnetwork_gb_per_s = 12.5\n')
    topology = read_topology(str(file))
    assert (topology.num_nodes, topology.accelerator.network_bytes_per_s) == (4, 12.5e9)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TargetError) as caught:
        read_topology(MISTAKES[name])
    golden(f"errors/topology_{name}.txt", str(caught.value))


FILES = {
    "text_for_devices": 'accelerator = "h100"\ndevices = "8"',
    "figures": 'accelerator = "h100"\ndevices = 8\nmemory_gb_per_s = "fast"\nmemory_bytes = -1\nlinks = "x"\nlink = ""',
    "own_table": 'devices = 8\n[accelerator]\nname = "X"\ntflops = 3',
    "no_devices": 'accelerator = "h100"',
    "not_toml": "accelerator: h100",
}


@pytest.mark.parametrize("name", FILES)
def test_mistake_in_a_file_is_told(
    name: str, tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(FILES[name])
    with pytest.raises(TargetError) as caught:
        read_topology("mine.toml")
    golden(f"errors/topology_file_{name}.txt", str(caught.value))
