"""Collect the settings that all processes of a run must share: options, config, versions, flags of jax and XLA.

They are compared before jax connects the processes. Facts that are known only later, such as the hash of the corpus,
are compared before the first step.
"""

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ...configs.changes import Changes
from ...configs.run_config import RunConfig
from ...hub.cached_folder import find_model_folder
from ...hub.peft.read import base_of, is_peft_folder
from ...meshes.axes import KNOWN_ROLES
from ..run_folder import Start

_PLACES = {"run.folder", "data.paths", "data.tokenizer", "train.init_from"}
"""Keys that may differ, since they are paths on a machine; their content is compared instead."""

_PACKAGES = ("trellax", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint", "grain")

_SWITCHES = (
    "jax_platforms",
    "jax_enable_x64",
    "jax_debug_nans",
    "jax_debug_infs",
    "jax_disable_jit",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
)
"""Options of jax that change a compiled program, or when it runs."""

_SAMPLES, _SAMPLE_BYTES = 4, 1 << 16


def collect_run_settings(config: RunConfig, *, start: Start, changes: Changes) -> dict[str, str]:
    """Return the settings of this process by name, before it joins the others."""
    return {
        **_config_values(config),
        "--fresh": "no" if start == "resume" else "yes",
        "--force": "yes" if start == "replace" else "no",
        "--override": "yes" if changes == "accept" else "no",
        **collect_program_settings(),
        "weights of train.init_from": sample_model(config.train.init_from),
    }


def collect_program_settings() -> dict[str, str]:
    """Return what compiled programs depend on besides their arguments: versions, options of jax, flags of XLA."""
    return {
        **_package_versions(),
        **{name: str(getattr(jax.config, name)) for name in _SWITCHES},
        "XLA_FLAGS": _read_xla_flags(os.environ),
    }


def short_hash(text: str) -> str:
    """Return the first 12 digits of a text's SHA-256, to compare long texts in one line."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _config_values(config: RunConfig) -> dict[str, str]:
    sections: dict[str, dict[str, Any]] = config.model_dump(mode="json")
    # An axis that one process has and another lacks is compared with one of a single device.
    sections["mesh"] = {**dict.fromkeys(KNOWN_ROLES, 1), **sections["mesh"]}
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    if config.pipeline.schedule.endswith(".csv"):
        # The path may differ between machines; the schedule itself is compared before the first step.
        values["pipeline.schedule"] = "a .csv"
    return {name: str(value) for name, value in values.items() if name not in _PLACES}


def _package_versions() -> dict[str, str]:
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    names = {*_PACKAGES, *(point.dist.name for point in plugins if point.dist)}
    versions = {name: importlib.metadata.version(name) for name in sorted(names)}
    return {"python": ".".join(platform.python_version_tuple()[:2]), **versions}


def _read_xla_flags(environ: Mapping[str, str]) -> str:
    """Return the XLA flags, sorted, without those that only set where programs are dumped."""
    flags = environ.get("XLA_FLAGS", "").split()
    return " ".join(sorted(flag for flag in flags if not flag.startswith("--xla_dump")))


def sample_model(name: str) -> str:
    """Return `sample_folder` of a model, and of the one that its adapters adapt, if it holds adapters alone.

    Raises:
        WeightsError: the folder of adapters does not say what they adapt.
    """
    folder = str(find_model_folder(name)) if name else ""
    found = sample_folder(folder)
    return f"{found} on {sample_folder(str(base_of(folder)))}" if folder and is_peft_folder(folder) else found


def sample_folder(name: str) -> str:
    """Return a hash of the names, the sizes and a few bytes of all files below a folder; "" without a folder."""
    if not name:
        return ""
    found = hashlib.sha256()
    for file in sorted(file for file in Path(name).rglob("*") if file.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(name)} {size}\n".encode())
        with file.open("rb") as opened:
            for part in range(_SAMPLES):
                opened.seek(part * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                found.update(opened.read(_SAMPLE_BYTES))
    return found.hexdigest()[:12]
