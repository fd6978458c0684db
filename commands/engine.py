"""Convert arguments to a model config and a mesh, and describe the engine, for commands that load a model."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from ..hub.model_folder import ModelSource, open_model
from ..layers import ModelConfig
from ..meshes import ConfigError, MeshSpec, build_mesh, use_fake_devices
from ..meshes.build import visible_devices
from ..meshes.errors import shown, suggest
from ..meshes.processes.messages import is_first
from ..serve import Engine, Sizes, check_model
from .arguments.ema import chosen_weights

_DTYPES = ("float32", "bfloat16")


def apply_dtype(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """Return the model config with the dtype of `--dtype` if it is given; check `--cache-dtype`.

    Raises:
        ConfigError: one of them is not a dtype that an engine computes in.
    """
    for option, name in (("--dtype", args.dtype), ("--cache-dtype", args.cache_dtype)):
        if name is not None and name not in _DTYPES:
            raise ConfigError(
                f"{option} {shown(name)}: unknown type.{suggest(name, _DTYPES)}", fix=f"use {' or '.join(_DTYPES)}."
            )
    return replace(config, dtype=args.dtype or config.dtype)


def resolve_mesh(text: str) -> MeshSpec:
    """Parse `--mesh`, and replace -1 by the number of devices that are left.

    Raises:
        MeshError: the text is not a mesh, or jax cannot start.
    """
    spec = MeshSpec.parse(text)
    # Even if no axis is -1: this starts jax, whose errors `visible_devices` explains.
    devices = visible_devices()
    return spec.resolve(num_devices=len(devices)) if -1 in spec.sizes.values() else spec


def open_served(args: argparse.Namespace) -> tuple[MeshSpec, ModelSource]:
    """Return the mesh of `--mesh` and the model of the folder, whose warnings are printed; no weight is read.

    Raises:
        TrellaxError: they cannot be opened.
    """
    # First, since fake devices must be chosen before jax starts.
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
    spec, source = resolve_mesh(args.mesh), open_model(args.folder, weights=chosen_weights(args))
    for warning in source.warnings if is_first() else ():
        print(f"warning   {warning}", file=sys.stderr)
    return spec, source


def check_served(config: ModelConfig, spec: MeshSpec, sizes: Mapping[str, Any]) -> None:
    """Raise unless model, mesh and sizes of an engine fit.

    Raises:
        TrellaxError: they do not.
    """
    check_model(config, spec.sizes, max_tokens=sizes["max_tokens"], axes=spec.roles)
    own = {name: sizes[name] for name in ("slots", "max_tokens", "groups", "chunk")}
    own["cache_tokens"] = sizes.get("cache_tokens")
    Sizes(num_shards=spec.data, items=1, rounds=1, **own)  # checks itself


def open_mesh(spec: MeshSpec) -> jax.sharding.Mesh:
    """Build the mesh over the first of the devices; the others stay idle.

    Raises:
        MeshError: there are fewer devices than the mesh has.
    """
    return build_mesh(spec, devices=visible_devices()[: spec.num_devices])


def describe_engine(engine: Engine, spec: MeshSpec, seconds: float) -> str:
    """Return the lines that a command prints once its engine is compiled."""
    sizes, mib = engine.sizes, 2**20
    return (
        f"mesh      {spec}, {sizes.slots} slots of {sizes.max_tokens} tokens in {sizes.groups} groups a data shard\n"
        f"device    {engine.param_bytes_per_device / mib:,.1f} MiB of weights, "
        f"{engine.cache_bytes_per_device / mib:,.1f} MiB of cache for {sizes.cached_tokens:,} tokens\n"
        f"ready     in {seconds:.1f} s"
    )
