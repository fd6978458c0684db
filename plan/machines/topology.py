"""Describe a machine: the kind and number of accelerators, how many share a node, and their links.

`h100x8` is one node, `h100x64/8` eight nodes of eight; a TOML file describes any other machine. The figures of known
accelerators are in `topologies.toml`, each with its source. Read `collective_time.py` next.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...meshes.arguments import check_fields
from ...meshes.errors import TargetError, printable, shown, suggest
from ...meshes.files.regular_file import read_bounded

_DATA = Path(__file__).with_name("topologies.toml")
_TEXT = re.compile(r"(?P<name>[a-z0-9.-]*?[a-z0-9])(?:[x:](?P<devices>[0-9]{1,9}))?(?:/(?P<node>[0-9]{1,9}))?")
_GIGA = 1e9
_MOST_BYTES = 50_000
_MOST_DEVICES = 1_000_000

# The type whose units a device uses for a type that it has none for.
_WIDER = {"float4": "float8", "float8": "bfloat16"}

# NCCL's default number of channels on links of NVIDIA's servers, each of which occupies one core.
_CHANNELS = 16

# No machine is near these limits, and all results computed within them stay finite.
_Figure = Annotated[float, Field(ge=1e-6, le=1e12)]
_Count = Annotated[int, Field(ge=1, le=1 << 60)]


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device: peaks in flops/s by element type, memory in bytes, bandwidths in bytes/s one way.

    `matmul_share` is the share of the peak that large matrix products in 16 bit keep under load, `narrow_shares` that
    of narrower ones, and `burst_share` what they reach before the clocks sink; `cores` run the tiles of a product;
    `curve` names the measured all-reduces over its links and is "" if there are none; `watts` is its power limit, or 0.
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
    host_bytes_per_s: float
    curve: str
    source: str
    narrow_shares: Mapping[str, float] = field(default_factory=dict)
    burst_share: float = 0.0
    watts: float = 0.0

    @property
    def load(self) -> float:
        """The share of its speed that the device keeps under load, 1 where it is not known."""
        return self.matmul_share / self.burst_share if self.burst_share else 1.0

    @property
    def collective_cores(self) -> float:
        """The share of the cores that a collective beside other work occupies; a TPU's links need none."""
        return 0.0 if self.link == "ici" else min(1.0, _CHANNELS / self.cores)

    @property
    def in_bursts(self) -> "Accelerator":
        """The same device in work of less than a second, as in serving a request."""
        shares = {dtype: share / self.load for dtype, share in self.narrow_shares.items()}
        return replace(self, matmul_share=self.matmul_share / self.load, narrow_shares=shares, burst_share=0.0)

    def peak_flops_per_s(self, dtype: str) -> float:
        """Return the dense matrix peak for an element type, in flops/s; of a wider one where it has no units for it."""
        found = self.flops_per_s.get(dtype)
        return found or self.flops_per_s[_WIDER.get(dtype, "float32")]

    def matmul_flops_per_s(self, dtype: str) -> float:
        """Return the flops/s that large matrix products reach."""
        if not self.flops_per_s.get(dtype) and dtype in _WIDER:
            return self.matmul_flops_per_s(_WIDER[dtype])
        return self.peak_flops_per_s(dtype) * self.narrow_shares.get(dtype, self.matmul_share)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Accelerators of one kind in nodes: `devices_per_node` share fast links, all share the network.

    >>> read_topology("h100x64/8").num_nodes
    8

    Raises:
        TargetError: there are no devices, too many, or they do not fill their nodes.
    """

    name: str
    accelerator: Accelerator
    num_devices: int
    devices_per_node: int

    def __post_init__(self) -> None:
        check_fields(self, error=TargetError, least=0)
        if self.num_devices < 1 or self.devices_per_node < 1:
            raise TargetError(
                f"topology {self.name!r} has {self.num_devices} devices, {self.devices_per_node} a node.",
                fix="give 1 or more of each.",
            )
        if max(self.num_devices, self.devices_per_node) > _MOST_DEVICES:
            raise TargetError(
                f"topology {self.name!r} has {self.num_devices} devices, {self.devices_per_node} a node.",
                fix=f"give {_MOST_DEVICES:,} or fewer of each.",
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
        """Return the same machine with another number of devices: whole nodes, or part of one."""
        return replace(self, name=f"{self.accelerator.key}x{num_devices}", num_devices=num_devices)


def read_topology(text: str) -> Topology:
    """Parse the name of a machine, or read a TOML file that describes one.

    `h100` is one device, `h100x8` eight in a node, `h100x64/8` sixty-four with eight a node; `h100:64/8` is the same. A
    file has a key `accelerator` (a known name, or a table with all of its figures), `devices`, and may set
    `devices_per_node` and any figure of the accelerator, such as `network_gb_per_s`.

    >>> read_topology("a100x16").devices_per_node
    8

    Raises:
        TargetError: the accelerator is unknown, the file cannot be read, or the numbers do not fit.
    """
    if text.endswith(".toml"):
        return _read_file(Path(text))
    # A name with an x of its own, such as rtx4090, is one device.
    found = _TEXT.fullmatch(f"{text}x1".lower() if text.lower() in _tables() else text.lower())
    if not found:
        raise TargetError(f"topology {text!r} is not written like h100x64/8.", fix="write name x devices / per node.")
    accelerator = find_accelerator(found["name"])
    devices = int(found["devices"] or 1)
    node = int(found["node"] or min(devices, accelerator.devices_per_node))
    return Topology(name=text, accelerator=accelerator, num_devices=devices, devices_per_node=node)


def find_accelerator(name: str) -> Accelerator:
    """Return a known accelerator by its key, its full name or an alias; case does not matter.

    Raises:
        TargetError: the name is unknown; the message suggests the nearest.
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
    """Return the known accelerators by key, name and alias, in lower case."""
    found = {}
    for key, table in _tables().items():
        accelerator = _make_accelerator(key, table)
        for name in (key, table["name"], *table.get("aliases", ())):
            found[name.lower()] = accelerator
    return found


@lru_cache
def _tables() -> dict[str, dict[str, Any]]:
    return tomllib.loads(_DATA.read_text())["accelerators"]


class _Peaks(BaseModel):
    """Dense matrix peaks in 10^12 flops/s; 0 if a device has no units for a type."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    bfloat16: _Figure
    float32: _Figure
    float16: _Figure | Literal[0] = 0
    float8: _Figure | Literal[0] = 0
    float4: _Figure | Literal[0] = 0


class _Shares(BaseModel):
    """Shares of the peaks that large matrix products in 8 and 4 bits reach."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    float8: float | None = Field(default=None, gt=0, le=1)
    float4: float | None = Field(default=None, gt=0, le=1)


class _Figures(BaseModel):
    """Schema of an accelerator in a TOML file; `topologies.toml` has examples."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    aliases: list[str] = []
    tflops: _Peaks
    memory_bytes: _Count
    memory_gb_per_s: _Figure
    cores: _Count
    matmul_share: float = Field(gt=0, le=1)
    narrow_shares: _Shares = _Shares()
    burst_share: float = Field(default=0, ge=0, le=1)
    link: Literal["nvlink", "pcie", "ici", "xgmi"]
    link_gb_per_s: _Figure
    devices_per_node: _Count
    network_gb_per_s: _Figure
    # 16 lanes of PCI Express 3.0, the slowest of those in the file.
    host_gb_per_s: _Figure = 15.75
    # The power limit; 0 where none is stated.
    watts: _Figure | Literal[0] = 0
    curve: str = ""
    source: str = "the user's own file"
    notes: str = ""


def _make_accelerator(key: str, table: Mapping[str, Any]) -> Accelerator:
    figures = _Figures.model_validate(table)
    return Accelerator(
        key=key,
        name=printable(figures.name, limit=80),
        flops_per_s={dtype: 1e12 * peak for dtype, peak in figures.tflops},
        memory_bytes=figures.memory_bytes,
        memory_bytes_per_s=_GIGA * figures.memory_gb_per_s,
        cores=figures.cores,
        matmul_share=figures.matmul_share,
        link=figures.link,
        link_bytes_per_s=_GIGA * figures.link_gb_per_s,
        devices_per_node=figures.devices_per_node,
        network_bytes_per_s=_GIGA * figures.network_gb_per_s,
        host_bytes_per_s=_GIGA * figures.host_gb_per_s,
        curve=figures.curve,
        source=printable(figures.source, limit=400),
        burst_share=figures.burst_share,
        narrow_shares={dtype: share for dtype, share in figures.narrow_shares if share is not None},
        watts=figures.watts,
    )


def _read_file(path: Path) -> Topology:
    """Read a machine from a TOML file: figures of its own, or those of a known accelerator with some replaced."""
    try:
        content = read_bounded(path, max_bytes=_MOST_BYTES, error=TargetError)
        table = tomllib.loads(content.decode("utf-8-sig").replace("\r\n", "\n"))
    except TargetError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"topology {path} cannot be read: {error}.", fix="name a TOML file of a machine.") from error
    for key in ("accelerator", "devices"):
        if key not in table:
            raise TargetError(
                f"topology {path} has no key {key!r}.", fix='start with accelerator = "h100", devices = 8.'
            )
    given = table.pop("accelerator")
    devices, node = _read_count(path, table, "devices"), _read_count(path, table, "devices_per_node")
    known: dict[str, Any] = given if isinstance(given, dict) else _tables()[find_accelerator(str(given)).key]
    try:
        accelerator = _make_accelerator(path.stem if isinstance(given, dict) else str(given), known | table)
    except ValidationError as error:
        raise _explain(path, error) from None
    node = node or min(devices, accelerator.devices_per_node)
    return Topology(
        name=printable(path.stem, limit=80), accelerator=accelerator, num_devices=devices, devices_per_node=node
    )


def _read_count(path: Path, table: dict[str, Any], key: str) -> int:
    """Remove a number of devices from the table and return it; 0 if it is left out."""
    count = table.pop(key, 0)
    if type(count) is not int or not 0 <= count <= _MOST_DEVICES:
        raise TargetError(
            f"topology {path}: {key}={shown(count)} is no whole number up to {_MOST_DEVICES:,}.",
            fix=f"write {key} = 8, say.",
        )
    return count


def _explain(path: Path, error: ValidationError) -> TargetError:
    """Return one error that lists every invalid figure of a file."""
    own = {"missing": "is not given", "model_type": "is a table, such as { bfloat16 = 989, float32 = 67 }"}
    lines = []
    for one in error.errors():
        key = ".".join(map(str, one["loc"]))
        what = own.get(one["type"], one["msg"].lower())
        if one["type"] == "extra_forbidden":
            what = f"is no figure of an accelerator.{suggest(key, _Figures.model_fields)}"
        lines.append(f"\n  {key}: {what}")
    return TargetError(
        f"topology {path}: {len(lines)} of its figures cannot be used.{''.join(lines)}",
        fix="see plan/machines/topologies.toml, which describes every known accelerator in these keys.",
    )


def _divisor(topology: Topology) -> int:
    """Return the largest number of devices per node that divides the number of devices."""
    return max(n for n in range(1, topology.devices_per_node + 1) if topology.num_devices % n == 0)
