"""Load the model in a folder for an engine: its parameters on a mesh, each device having read its own part.

Any model can be quantized once it is read, one kernel after another; `../layers/quantized.py` has the formats. Read
`params.py` for the shapes.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..hub.model_folder import ModelSource, open_model
from ..layers import ModelConfig
from ..layers.quantized import SCALE, Weights, dequantize, quantize
from ..meshes import ConfigError, MeshAxes, ServeError
from ..meshes.arguments import check_choice
from ..meshes.axes import DEFAULT_AXES
from .params import param_shapes


def load_for_serving(
    path: str | Path,
    *,
    mesh: Mesh,
    dtype: Literal["float32", "bfloat16"] | None = None,
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "plain",
) -> tuple[ModelSource, Any]:
    """Return the model in a folder and its parameters on a mesh.

    >>> source, params = load_for_serving("runs/quickstart", mesh=mesh)
    >>> engine = Engine(source.config, params, mesh=mesh)

    Args:
        dtype: type of the parameters and to compute in; the model's own if left out.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.
        weights: "int8" or "fp8" for linear layers in eight bits, see `quantize_params`.

    Raises:
        TrellaxError: there is no model, or it does not fit the mesh; then nothing was read.
    """
    check_choice("dtype", dtype, (None, "float32", "bfloat16"), error=ConfigError)
    check_choice("weights", weights, get_args(Weights), error=ConfigError)
    source = open_model(path)
    # The config too: an engine is made of both.
    config = replace(source.config, dtype=dtype or source.config.dtype)
    params = source.read(param_shapes(config, mesh=mesh, axes=axes))
    params, _ = quantize_params(params, config=config, mesh=mesh, weights=weights, axes=axes)
    return replace(source, config=config), params


@dataclass(frozen=True, kw_only=True)
class RoundingError:
    """What rounding took from weights, relative to them: the root of the sum of squares, of all and of one kernel.

    Args:
        all: of all quantized kernels together.
        worst, largest: the kernel that lost most, all layers of it, and how much.
    """

    all: float
    worst: str
    largest: float

    def __str__(self) -> str:
        return f"rounded by {self.all:.2%} of their norm, at most {self.largest:.2%} ({self.worst})"


def quantize_params(
    params: Any, *, config: ModelConfig, mesh: Mesh, weights: Weights, axes: MeshAxes = DEFAULT_AXES
) -> tuple[Any, RoundingError | None]:
    """Return parameters in natural order with quantized kernels, and the error; "plain" ones as they are, and None.

    Each kernel is deleted once it is quantized, so at most one is in memory twice.

    Raises:
        ServeError: there is no such format.

    >>> params, error = quantize_params(params, config=config, mesh=mesh, weights="int8")
    >>> engine = Engine(config, params, mesh=mesh)
    """
    check_choice("weights", weights, get_args(Weights), error=ServeError)
    if weights == "plain":
        return params, None
    wanted = param_shapes(config, mesh=mesh, axes=axes, weights=weights)
    norms: dict[str, jax.Array] = {}
    converted = _convert(params, wanted, weights, "", norms)
    sums = {name: jax.device_get(norm) for name, norm in norms.items()}
    lost, whole = (sum(float(norm[index]) for norm in sums.values()) for index in (0, 1))
    shares = {name: float(norm[0] / norm[1]) ** 0.5 if norm[1] else 0.0 for name, norm in sums.items()}
    worst = max(shares, key=shares.__getitem__)
    return converted, RoundingError(all=(lost / whole) ** 0.5 if whole else 0.0, worst=worst, largest=shares[worst])


def _convert(given: Any, wanted: Any, weights: Weights, path: str, norms: dict[str, jax.Array]) -> Any:
    """Return a part of the tree as it is wanted, and add the sums of squares of its kernels to `norms`."""
    if not isinstance(wanted, dict):
        return given
    found = {}
    for name, own in wanted.items():
        if name == "kernel" and SCALE in wanted:
            shardings = (own.sharding, wanted[SCALE].sharding, None)
            run = jax.jit(partial(_quantize, weights=weights), out_shardings=shardings)
            found[name], found[SCALE], norms[path] = run(given[name])
            given[name].delete()
        elif name != SCALE:
            found[name] = _convert(given[name], own, weights, f"{path}.{name}".lstrip("."), norms)
    return found


def _quantize(kernel: jax.Array, *, weights: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return values, scale, and the sums of squares of what is lost and of the kernel."""
    values, scale = quantize(kernel, weights)
    whole = kernel.astype(jnp.float32)
    return values, scale, jnp.stack([((whole - dequantize(values, scale)) ** 2).sum(), (whole**2).sum()])
