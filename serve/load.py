"""Load the model in a folder for an engine: its parameters on a mesh, each device having read its own part."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from jax.sharding import Mesh

from ..hub.model_folder import ModelSource, open_model
from ..layers.quantized import Weights
from ..meshes import ConfigError, MeshAxes
from ..meshes.arguments import check_choice
from ..meshes.axes import DEFAULT_AXES
from .params import param_shapes
from .quantize import quantize_params


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
        weights: "int8" or "fp8" for linear layers in eight bits, see `quantize.py`.

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
