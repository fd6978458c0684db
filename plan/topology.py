"""Machines as the planner sees them: an accelerator, how many, how many share a node, and what links them.

`h100x8` is one node, `h100x64/8` eight nodes of eight; a TOML file describes any other machine. The figures of known
accelerators are in `topologies.toml`, each with its source. Read `collective_time.py` next.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..meshes.errors import TargetError, suggest

_DATA = Path(__file__).with_name("topologies.toml")
_TEXT = re.compile(r"(?P<name>[a-z0-9.-]*?[a-z0-9])(?:x(?P<devices>\d+))?(?:/(?P<node>\d+))?")
_GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device: peaks in flops/s by element type, memory in bytes, bandwidths in bytes/s one way.

    `matmul_share` is the largest share of the peak that long matrix products keep; `cores` are the units that tiles
    of a product are dealt to; `curve` names the measured all-reduces of its links, "" where there are none.
    """

    key: str
    name: str
    flops_per_s: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_s: float
    cores: int
    matmul_share: float
    link: str
    link_bytes_per_s: float
    devices_per_node: int
    network_bytes_per_s: float
    curve: str
    source: str

    def peak_flops_per_s(self, dtype: str) -> float:
        """Return the dense matrix peak for an element type, in flops/s."""
        return self.flops_per_s.get(dtype) or self.flops_per_s["float32"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Accelerators of one kind in nodes: `devices_per_node` share fast links, all share the network.

    >>> read_topology("h100x64/8").num_nodes
    8

    Raises:
        TargetError: no devices, or nodes that are not full.
    """

    name: str
    accelerator: Accelerator
    num_devices: int
    devices_per_node: int

    def __post_init__(self) -> None:
        if self.num_devices < 1 or self.devices_per_node < 1:
            raise TargetError(
                f"topology {self.name!r} has {self.num_devices} devices, {self.devices_per_node} a node.",
                fix="give 1 or more of each.",
            )
        if self.num_devices > self.devices_per_node and self.num_devices % self.devices_per_node:
            larger = -(-self.num_devices // self.devices_per_node) * self.devices_per_node
            raise TargetError(
                f"topology {self.name!r}: {self.num_devices} devices do not fill nodes of {self.devices_per_node}: "
                f"{self.num_devices} / {self.devices_per_node} = {self.num_devices / self.devices_per_node:.2f}.",
                fix=f"ask for {larger} devices, or write {self.accelerator.key}x{self.num_devices}/{_divisor(self)}.",
            )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return -(-self.num_devices // self.devices_per_node)

    def with_devices(self, num_devices: int) -> "Topology":
        """Return the same machine with another number of devices, a whole number of nodes or part of one."""
        return replace(self, name=f"{self.accelerator.key}x{num_devices}", num_devices=num_devices)


def read_topology(text: str) -> Topology:
    """Return the machine that a text names, or that a TOML file describes.

    `h100` is one device, `h100x8` eight in a node, `h100x64/8` sixty-four with eight a node. A file has a key
    `accelerator` (a known name, or a table with all of its figures), `devices`, and may set `devices_per_node` and any
    figure of the accelerator, such as `network_gb_per_s`.

    >>> read_topology("a100x16").devices_per_node
    8

    Raises:
        TargetError: the accelerator or the file is not known, or the numbers do not fit.
    """
    if text.endswith(".toml"):
        return _read_file(Path(text))
    found = _TEXT.fullmatch(text.lower())
    if not found:
        raise TargetError(f"topology {text!r} is not written like h100x64/8.", fix="write name x devices / per node.")
    accelerator = find_accelerator(found["name"])
    devices = int(found["devices"] or 1)
    node = int(found["node"] or min(devices, accelerator.devices_per_node))
    return Topology(name=text, accelerator=accelerator, num_devices=devices, devices_per_node=node)


def find_accelerator(name: str) -> Accelerator:
    """Return a known accelerator by its key, its full name or another name of it, in any case.

    Raises:
        TargetError: there is none; the text suggests the nearest.
    """
    known = _accelerators()
    wanted = name.lower()
    if wanted not in known:
        keys = sorted({accelerator.key for accelerator in known.values()})
        raise TargetError(
            f"unknown accelerator {name!r}; there are {', '.join(keys)}.{suggest(wanted, known)}",
            fix="describe your own in a TOML file: accelerator, devices, devices_per_node.",
        )
    return known[wanted]


@lru_cache
def _accelerators() -> dict[str, Accelerator]:
    tables = tomllib.loads(_DATA.read_text())["accelerators"]
    found = {}
    for key, table in tables.items():
        accelerator = _make_accelerator(key, table)
        for name in (key, table["name"], *table.get("aliases", ())):
            found[name.lower()] = accelerator
    return found


def _make_accelerator(key: str, table: Mapping[str, Any]) -> Accelerator:
    return Accelerator(
        key=key,
        name=table["name"],
        flops_per_s={dtype: 1e12 * peak for dtype, peak in table["tflops"].items()},
        memory_bytes=int(table["memory_bytes"]),
        memory_bytes_per_s=_GIGA * table["memory_gb_per_s"],
        cores=table["cores"],
        matmul_share=table["matmul_share"],
        link=table["link"],
        link_bytes_per_s=_GIGA * table["link_gb_per_s"],
        devices_per_node=table["devices_per_node"],
        network_bytes_per_s=_GIGA * table["network_gb_per_s"],
        curve=table.get("curve", ""),
        source=table["source"],
    )


def _read_file(path: Path) -> Topology:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TargetError(f"topology {path} cannot be read: {error}.", fix="name a TOML file of a machine.") from error
    for key in ("accelerator", "devices"):
        if key not in table:
            raise TargetError(
                f"topology {path} has no key {key!r}.", fix='start with accelerator = "h100", devices = 8.'
            )
    given = table["accelerator"]
    try:
        accelerator = _make_accelerator(path.stem, given) if isinstance(given, dict) else find_accelerator(given)
        accelerator = _override(accelerator, table)
    except KeyError as error:
        raise TargetError(
            f"topology {path}: its [accelerator] has no {error}.",
            fix="give every figure that plan/topologies.toml gives, or the name of a known accelerator.",
        ) from error
    devices = table["devices"]
    node = table.get("devices_per_node", min(devices, accelerator.devices_per_node))
    return Topology(name=path.stem, accelerator=accelerator, num_devices=devices, devices_per_node=node)


def _override(accelerator: Accelerator, table: Mapping[str, Any]) -> Accelerator:
    """The accelerator with the figures that the file sets beside its name."""
    names = {field.name for field in fields(Accelerator)}
    changes: dict[str, Any] = {}
    for key, value in table.items():
        own = key.replace("_gb_per_s", "_bytes_per_s")
        if key in ("accelerator", "devices", "devices_per_node"):
            continue
        if own not in names:
            raise TargetError(
                f"topology key {key!r} is not known.{suggest(key, names)}", fix="see plan/topologies.toml."
            )
        changes[own] = _GIGA * value if own != key else value
    return replace(accelerator, **changes)


def _divisor(topology: Topology) -> int:
    """The most devices a node that a number of devices fills."""
    return max(n for n in range(1, topology.devices_per_node + 1) if topology.num_devices % n == 0)
