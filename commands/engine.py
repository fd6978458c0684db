"""Convert arguments to a model config and a mesh, and describe the engine, for commands that load a model."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import jax

from ..hub.model_folder import ModelSource, open_model
from ..layers import ModelConfig
from ..layers.attention.cache import CacheDtype
from ..layers.quantized import Weights
from ..meshes import ConfigError, MeshSpec, build_mesh, use_fake_devices
from ..meshes.build import visible_devices
from ..meshes.errors import shown, suggest
from ..meshes.processes.messages import is_first
from ..serve import Engine, Sizes, Speculation, check_model, param_shapes, quantize_params
from ..serve.load import RoundingError, read_params
from ..serve.speculation.draft import check_draft
from .arguments.ema import chosen_weights

_DTYPES = ("float32", "bfloat16")


def apply_dtype(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """Return the model config with the dtype of `--dtype` if it is given; check `--weights` and `--cache-dtype`.

    Raises:
        ConfigError: one of them is not a type that an engine has there.
    """
    check_formats(args)
    return replace(config, dtype=args.dtype or config.dtype)


def check_formats(args: argparse.Namespace) -> None:
    """Check `--dtype`, where a command has it, `--weights` and `--cache-dtype`.

    Raises:
        ConfigError: one of them is not a type that an engine has there.
    """
    for option, name, known in (
        ("--dtype", getattr(args, "dtype", None), _DTYPES),
        ("--weights", args.weights, get_args(Weights)),
        ("--cache-dtype", args.cache_dtype, get_args(CacheDtype)),
    ):
        if name is not None and name not in known:
            raise ConfigError(
                f"{option} {shown(name)}: unknown type.{suggest(name, known)}",
                fix=f"use {', '.join(known[:-1])} or {known[-1]}.",
            )


def resolve_mesh(text: str) -> MeshSpec:
    """Parse `--mesh`, and replace -1 by the number of devices that are left.

    Raises:
        MeshError: the text is not a mesh, or jax cannot start.
    """
    return resolve_devices(MeshSpec.parse(text))


def resolve_devices(spec: MeshSpec, *, fake_devices: int = 0) -> MeshSpec:
    """Return a mesh with -1 replaced by the number of devices that are left; `fake_devices` are started first.

    Raises:
        MeshError: jax cannot start.
    """
    if fake_devices:
        use_fake_devices(fake_devices)
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


def load_params(source: ModelSource, spec: MeshSpec, args: argparse.Namespace, *, mesh: jax.sharding.Mesh) -> Any:
    """Read the parameters of a model, quantize them as `--weights` says, and print what rounding costs.

    Raises:
        TrellaxError: they cannot be read.
    """
    return _tell(args, *read_params(source, mesh=mesh, weights=args.weights, axes=spec.roles))


def quantize_and_tell(
    params: Any, config: ModelConfig, spec: MeshSpec, args: argparse.Namespace, *, mesh: jax.sharding.Mesh
) -> Any:
    """Quantize parameters as `--weights` says, and print what rounding costs."""
    return _tell(args, *quantize_params(params, config=config, mesh=mesh, weights=args.weights, axes=spec.roles))


def _tell(args: argparse.Namespace, params: Any, error: RoundingError | None) -> Any:
    if error is not None:
        print(f"weights   {args.weights}, a scale for each output channel: {error}", file=sys.stderr)
    return params


@dataclass(frozen=True)
class Guesser:
    """What `--speculate` names: how many tokens to guess, and the draft model, None for look-up."""

    tokens: int
    source: ModelSource | None = None

    def load(self, spec: MeshSpec, mesh: jax.sharding.Mesh) -> Speculation:
        """Read the draft model, if there is one.

        Raises:
            TrellaxError: it cannot be read.
        """
        if self.source is None:
            return Speculation(tokens=self.tokens)
        config = self.source.config
        params = self.source.read(param_shapes(config, mesh=mesh, axes=spec.roles))
        return Speculation(tokens=self.tokens, draft=(config, params))


def open_guesser(
    args: argparse.Namespace, config: ModelConfig, spec: MeshSpec, sizes: Mapping[str, Any]
) -> Guesser | None:
    """Return what `--speculate` names, checked; no weight is read.

    Raises:
        TrellaxError: there is no such model, or it cannot guess for this one on the mesh.
    """
    if args.speculate is None:
        return None
    if args.speculate == "lookup":
        return Guesser(Speculation(tokens=args.speculate_tokens).tokens)
    source = open_model(args.speculate)
    source = replace(source, config=replace(source.config, dtype=config.dtype))
    Speculation(tokens=args.speculate_tokens, draft=(source.config, None)).check(config)
    check_draft(source.config, spec.sizes, max_tokens=sizes["max_tokens"], axes=spec.roles)
    return Guesser(args.speculate_tokens, source)


def describe_engine(engine: Engine, spec: MeshSpec, seconds: float) -> str:
    """Return the lines that a command prints once its engine is compiled."""
    sizes, mib, further = engine.sizes, 2**20, ""
    if engine.draft_bytes_per_device:
        further = f"draft     {engine.draft_bytes_per_device / mib:,.1f} MiB of another model, its cache included\n"
    if engine.cache_dtype == "fp8":
        further += "cache     fp8, a scale for each token and head: numbers rounded by at most 6.25%, 2.6% on average\n"
    return (
        f"mesh      {spec}, {sizes.slots} slots of {sizes.max_tokens} tokens in {sizes.groups} groups a data shard\n"
        f"device    {engine.param_bytes_per_device / mib:,.1f} MiB of weights, "
        f"{engine.cache_bytes_per_device / mib:,.1f} MiB of cache for {sizes.cached_tokens:,} tokens\n"
        f"{further}ready     in {seconds:.1f} s"
    )
