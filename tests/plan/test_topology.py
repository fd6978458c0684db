"""Machines by name, from a file, and the mistakes in both."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.meshes import TargetError
from trellax.plan.machines.topology import find_accelerator, read_topology

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
    golden(f"errors/plan/topology_{name}.txt", str(caught.value))


FILES = {
    "text_for_devices": 'accelerator = "h100"\ndevices = "8"',
    "figures": 'accelerator = "h100"\ndevices = 8\nmemory_gb_per_s = "fast"\nmemory_bytes = -1\nlinks = "x"\nlink = ""',
    "own_table": 'devices = 8\n[accelerator]\nname = "X"\ntflops = 3',
    "no_devices": 'accelerator = "h100"',
    "not_toml": "accelerator: h100",
}


@pytest.mark.parametrize("name", FILES)
def test_mistake_in_a_file_is_an_error(
    name: str, tmp_path: Path, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(FILES[name])
    with pytest.raises(TargetError) as caught:
        read_topology("mine.toml")
    golden(f"errors/plan/topology_file_{name}.txt", str(caught.value))


GOOD = 'accelerator = "h100"\ndevices = 8\n'
ODD_FILES: dict[str, Callable[[Path], object]] = {
    "is a named pipe": os.mkfifo,
    "is a device": lambda path: path.symlink_to("/dev/zero"),
    "is a folder": Path.mkdir,
    "such a file has at most": lambda path: (path.touch(), os.truncate(path, 1 << 33)),
    "no whole number up to 1,000,000": lambda path: path.write_text(f'accelerator = "h100"\ndevices = 1{"0" * 31}\n'),
    r"devices=-8 is no whole number": lambda path: path.write_text('accelerator = "h100"\ndevices = -8\n'),
    "memory_bytes: input should be": lambda path: path.write_text(f"{GOOD}memory_bytes = {'9' * 400}\n"),
    "memory_gb_per_s: input should be": lambda path: path.write_text(f"{GOOD}memory_gb_per_s = 1e-300\n"),
    "has no key": lambda path: path.write_text(f"{'a.' * 20_000}b = 1\n"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("told", ODD_FILES)
def test_file_from_others_is_refused_by_name_and_soon(told: str, tmp_path: Path) -> None:
    ODD_FILES[told](tmp_path / "odd.toml")
    with pytest.raises(TargetError, match=told) as caught:
        read_topology(str(tmp_path / "odd.toml"))
    assert "odd.toml" in str(caught.value)


@pytest.mark.timeout(20)
def test_more_devices_than_any_machine_has_are_refused() -> None:
    with pytest.raises(TargetError, match="1,000,000 or fewer"):
        read_topology("h100x999999999/999999998")


def test_file_of_windows_is_read_and_its_names_are_shown_escaped(tmp_path: Path) -> None:
    figures = "tflops = { bfloat16 = 1, float32 = 1 }\nmemory_bytes = 9\nmemory_gb_per_s = 1\ncores = 1\n"
    figures += 'matmul_share = 1\nlink = "pcie"\nlink_gb_per_s = 1\ndevices_per_node = 8\nnetwork_gb_per_s = 1\n'
    text = f'devices = 8\n[accelerator]\nname = "\\u001b[31mred"\n{figures}'
    file = tmp_path / "\x1b[2J.toml"
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    topology = read_topology(str(file))
    assert (topology.name, topology.accelerator.name) == ("\\x1b[2J", "\\x1b[31mred")
