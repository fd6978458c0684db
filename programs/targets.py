"""Targets to compile for: fake CPU devices, or GPUs that need not be present.

jax's CUDA plugin compiles GPU programs without a GPU. XLA's descriptions of GPUs are read from the installed plugin, so
that names and numbers match the compiler in use. Read `hardware.py` next.
"""

import importlib.util
import mmap
import os
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from ..meshes import TargetError, use_fake_devices
from ..meshes.arguments import check_count, check_fields
from ..meshes.build import visible_devices
from ..meshes.errors import suggest
from .hardware import Hardware, hardware_from_description, measure_host

MAX_DEVICES = 1024
"""Largest number of devices of a target."""

DEVICES_PER_NODE = 8
"""Default number of GPUs per node."""

_SYNTAX = re.compile(r"([a-z0-9][a-z0-9.\-]*)(?::([0-9]{1,9}))?(?:/([0-9]{1,9}))?$")
_DESCRIPTION = re.compile(rb'device_description_str: "([^"]*)"')
_MAKERS = ("nvidia", "tesla")
_VARIANTS = ("pcie", "mig")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The name of a machine: `cpu`, `h200:8`, `h100:64/8` (8 per node); 0 devices means as many as the mesh needs.

    Raises:
        TargetError: the text is not a target, or asks for too many devices or uneven nodes.
    """

    name: str
    num_devices: int = 0
    devices_per_node: int = 0

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Parse a target written as `name`, `name:devices` or `name:devices/devices per node`."""
        found = _SYNTAX.match(text.strip().lower())
        if found is None:
            raise TargetError(f"{text!r} is no target.", fix="write cpu, h200:8, or h100:64/8 for 8 GPUs a node.")
        return cls(name=found[1], num_devices=int(found[2] or 0), devices_per_node=int(found[3] or 0))

    def __post_init__(self) -> None:
        check_fields(self, error=TargetError, least=0)
        if self.num_devices > MAX_DEVICES:
            raise TargetError(
                f"target {self} has {self.num_devices:,} devices; at most {MAX_DEVICES:,} are compiled for.",
                fix="inspect a smaller mesh: per device, data parallelism changes little but its own traffic.",
            )
        if self.num_devices and self.devices_per_node and self.num_devices % self.devices_per_node:
            raise TargetError(
                f"target {self}: {self.num_devices} devices do not fill nodes of {self.devices_per_node}.",
                fix=f"ask for a multiple of {self.devices_per_node}.",
            )

    def __str__(self) -> str:
        count = f":{self.num_devices}" if self.num_devices else ""
        return f"{self.name}{count}" + (f"/{self.devices_per_node}" if self.devices_per_node else "")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """An opened target: devices for a mesh, and their peaks."""

    devices: Sequence[jax.Device]
    hardware: Hardware
    devices_per_node: int


def open_target(target: Target, *, num_devices: int) -> Machine:
    """Return the devices and peaks of a target: fake CPU devices, or GPUs that only the compiler knows.

    Args:
        num_devices: number of devices for targets that do not name one.

    Raises:
        TargetError: an unknown GPU, no plugin to compile for it, or devices that do not fill nodes.
        MeshError: jax has already started with another number of CPU devices.
    """
    check_count("num_devices", num_devices, error=TargetError)
    target = Target(
        name=target.name, num_devices=target.num_devices or num_devices, devices_per_node=target.devices_per_node
    )
    if target.name == "cpu":
        use_fake_devices(target.num_devices)
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        hardware = measure_host(num_devices=target.num_devices, memory_bytes=memory_bytes)
        return Machine(devices=visible_devices(), hardware=hardware, devices_per_node=target.num_devices)
    return _open_gpus(target)


def list_gpus() -> dict[str, str]:
    """Return XLA's descriptions of GPUs by name (`h200-141gb-hbm3e`) from the installed CUDA plugin.

    Raises:
        TargetError: no CUDA plugin is installed, or one that holds no descriptions.
    """
    library = _find_plugin()
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        # The descriptions are C strings in the library's data: a null byte comes before and after each.
        places = [(found.start(), found.end(), found[1].decode()) for found in _DESCRIPTION.finditer(content)]
        texts = {
            name: content[content.rfind(b"\0", 0, start) + 1 : content.find(b"\0", end)].decode()
            for start, end, name in places
        }
    known = {"-".join(_words(name)): text for name, text in texts.items() if 'platform_name: "CUDA"' in text}
    if not known:
        raise TargetError(
            f"the CUDA plugin of jax {jax.__version__} holds no descriptions of GPUs to compile for; that of jax 0.12 "
            "does, which needs Python 3.12.",
            fix="use Python 3.12 with pip install 'trellax[cuda]', or --target cpu.",
        )
    return known


def choose_gpu(name: str, known: Sequence[str]) -> str:
    """Return the full name for a short one such as `h200` or `a100-80`; PCIe cards and MIG slices only if named.

    >>> choose_gpu("h100", ["h100-80gb-hbm3", "h100-pcie", "h200-141gb-hbm3e"])
    'h100-80gb-hbm3'

    Raises:
        TargetError: no name fits, or several do.
    """
    wanted = name.split("-")
    fitting = [one for one in known if all(_is_named(word, one.split("-")) for word in wanted)]
    plain = [one for one in fitting if not any(variant in one.split("-") for variant in _VARIANTS)]
    found = [name] if name in known else plain or fitting
    if len(found) == 1:
        return found[0]
    if found:
        raise TargetError(f"target {name!r} could be {' or '.join(found)}.", fix=f"write {found[-1]}, say.")
    nearest = suggest(name, sorted({*known, *(one.split("-")[0] for one in known)}))
    raise TargetError(
        f"unknown target {name!r}; the CUDA plugin knows {', '.join(sorted(known))}.{nearest}", fix="use one, or cpu."
    )


def _open_gpus(target: Target) -> Machine:
    known = list_gpus()
    text = known[choose_gpu(target.name, list(known))]
    per_node = target.devices_per_node or min(DEVICES_PER_NODE, target.num_devices)
    if target.num_devices % per_node:
        raise TargetError(
            f"target {target}: {target.num_devices} devices do not fill nodes of {per_node}.",
            fix=f"say how many a node has, {target.name}:{target.num_devices}/4 say.",
        )
    # The plugin warns on stderr about programs that do not fit; the report has the same information.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Compiling needs no GPU: on "cpu" jax starts without one, and leaves one that is there alone.
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x{target.num_devices // per_node}x{per_node}",
        target_config=text,
    )
    hardware = hardware_from_description(text)
    return Machine(devices=topology.devices, hardware=hardware, devices_per_node=per_node)


def _find_plugin() -> Path:
    """Find the shared library of jax's CUDA plugin."""
    spec = importlib.util.find_spec("jax_plugins")
    for path in (spec.submodule_search_locations if spec else None) or ():
        for module in pkgutil.iter_modules([path]):
            if module.name.startswith("xla_cuda"):
                for library in sorted(Path(path, module.name).glob("*.so")):
                    return library
    raise TargetError(
        "a GPU target is compiled by jax's CUDA plugin, which is not installed.",
        fix="pip install 'trellax[cuda]' (no GPU is needed), or use --target cpu.",
    )


def _words(name: str) -> list[str]:
    """Return the lower-case words of a GPU's name without its maker: `NVIDIA H200 141GB` gives h200 and 141gb."""
    words = re.findall(r"[a-z0-9.]+", name.lower())
    return [word for word in words if word not in _MAKERS]


def _is_named(word: str, words: Sequence[str]) -> bool:
    """Return whether a word of a short name is in the full one; `80` matches `80gb`."""
    return word in words or f"{word}gb" in words
