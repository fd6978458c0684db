"""Load the model in a folder for an engine: its parameters on a mesh, each device having read its own part.

Any model can be quantized once it is read, one kernel after another; `../layers/quantized.py` has the formats. Read
`params.py` for the shapes.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ..hub.model_folder import ModelSource, open_model
from ..hub.run_params import Weights as SavedWeights
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
    saved: SavedWeights = "last",
) -> tuple[ModelSource, Any]:
    """Return the model in a folder and its parameters on a mesh.

    >>> source, params = load_for_serving("runs/quickstart", mesh=mesh)
    >>> engine = Engine(source.config, params, mesh=mesh)

    Args:
        dtype: type of the parameters and to compute in; the model's own if left out.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.
        weights: "int8" or "fp8" for linear layers in eight bits, see `read_params`.
        saved: which weights of a run, those of its last step or their average, "ema".

    Raises:
        TrellaxError: there is no model, or it does not fit the mesh; then nothing was read.
    """
    check_choice("dtype", dtype, (None, "float32", "bfloat16"), error=ConfigError)
    check_choice("weights", weights, get_args(Weights), error=ConfigError)
    check_choice("saved", saved, get_args(SavedWeights), error=ConfigError)
    source = open_model(path, weights=saved)
    # The config too: an engine is made of both.
    source = replace(source, config=replace(source.config, dtype=dtype or source.config.dtype))
    return source, read_params(source, mesh=mesh, weights=weights, axes=axes)[0]


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


def read_params(
    source: ModelSource, *, mesh: Mesh, weights: Weights = "plain", axes: MeshAxes = DEFAULT_AXES
) -> tuple[Any, RoundingError | None]:
    """Return the parameters of a model, and what rounding took from them, None if they are plain.

    Of a Hugging Face folder each kernel is rounded before the next one is read, so that one of them is in memory in the
    type that the model has; of a run all are read first.

    Raises:
        ServeError: there is no such format.
        TrellaxError: they cannot be read.
    """
    shapes = param_shapes(source.config, mesh=mesh, axes=axes)
    if weights == "plain":
        return source.read(shapes), None
    rounding = _Rounding(source.config, mesh, weights, axes)
    params = rounding.unpack(source.read(shapes, each=rounding.round))
    return params, rounding.error


def quantize_params(
    params: Any, *, config: ModelConfig, mesh: Mesh, weights: Weights, axes: MeshAxes = DEFAULT_AXES
) -> tuple[Any, RoundingError | None]:
    """Return parameters in natural order with quantized kernels, and the error; "plain" ones as they are, and None.

    Each kernel is deleted once it is quantized, so at most one is in memory twice.

    >>> params, error = quantize_params(params, config=config, mesh=mesh, weights="int8")
    >>> engine = Engine(config, params, mesh=mesh)

    Raises:
        ServeError: there is no such format.
    """
    check_choice("weights", weights, get_args(Weights), error=ServeError)
    if weights == "plain":
        return params, None
    rounding = _Rounding(config, mesh, weights, axes)
    params = rounding.unpack(jax.tree_util.tree_map_with_path(lambda path, x: rounding.round(_name(path), x), params))
    return params, rounding.error


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


class _Rounded(NamedTuple):
    """A quantized kernel, in the place of a plain one."""

    values: jax.Array
    scale: jax.Array


class _Rounding:
    """Quantizes kernels one after another, and adds up what is lost."""

    def __init__(self, config: ModelConfig, mesh: Mesh, weights: Weights, axes: MeshAxes) -> None:
        check_choice("weights", weights, get_args(Weights), error=ServeError)
        wanted = param_shapes(config, mesh=mesh, axes=axes, weights=weights)
        leaves = jax.tree_util.tree_leaves_with_path(wanted)
        self._weights, self._shardings = weights, {_name(path): leaf.sharding for path, leaf in leaves}
        self._norms: dict[str, jax.Array] = {}

    def round(self, path: str, leaf: jax.Array) -> Any:
        """Return a quantized kernel, whose plain one is deleted, or another parameter as it is."""
        layer, _, name = path.rpartition(".")
        scale = self._shardings.get(f"{layer}.{SCALE}")
        if name != "kernel" or scale is None:
            return leaf
        run = jax.jit(partial(_quantize, weights=self._weights), out_shardings=(self._shardings[path], scale, None))
        *found, self._norms[layer] = run(leaf)
        # Its memory is free when the next one is read.
        jax.block_until_ready(found)
        leaf.delete()
        return _Rounded(*found)

    def unpack(self, params: Any) -> Any:
        """Return the tree with values and scales as parameters of their layers."""
        found = {}
        for name, own in params.items():
            if isinstance(own, _Rounded):
                found |= {name: own.values, SCALE: own.scale}
            else:
                found[name] = self.unpack(own) if isinstance(own, dict) else own
        return found

    @property
    def error(self) -> RoundingError:
        """What rounding took."""
        sums = {name: jax.device_get(norm) for name, norm in self._norms.items()}
        lost, whole = (sum(float(norm[index]) for norm in sums.values()) for index in (0, 1))
        shares = {name: float(norm[0] / norm[1]) ** 0.5 if norm[1] else 0.0 for name, norm in sums.items()}
        worst = max(shares, key=shares.__getitem__)
        return RoundingError(all=(lost / whole) ** 0.5 if whole else 0.0, worst=worst, largest=shares[worst])


def _quantize(kernel: jax.Array, *, weights: Weights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return values, scale, and the sums of squares of what is lost and of the kernel."""
    values, scale = quantize(kernel, weights)
    whole = kernel.astype(jnp.float32)
    return values, scale, jnp.stack([((whole - dequantize(values, scale)) ** 2).sum(), (whole**2).sum()])
