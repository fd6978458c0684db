"""Load the model in a folder as a `Transformer` with its parameters on a mesh, to be called as `model(tokens)`.

To answer prompts use `trellax.serve`; to train on, `trellax train` with `train.init_from`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import Mesh

from ..layers import ModelConfig, Transformer, model_rules, param_dims
from ..layers.partitioning import param_dtype
from ..layers.vocabulary import natural_sharding, pad_tables
from ..meshes import ConfigError, MeshAxes, MeshSpec, ShardingRules, build_mesh
from ..meshes.arguments import check_choice
from ..meshes.axes import DEFAULT_AXES
from .model_folder import load_params, read_model_config
from .run_params import Weights, check_weights


def load_model(
    folder: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    axes: MeshAxes = DEFAULT_AXES,
    weights: Weights = "last",
) -> Transformer:
    """Return the model in a run folder or a Hugging Face folder; each device reads its part of the parameters.

    >>> model = load_model("runs/quickstart", mesh=build_mesh(MeshSpec(tensor=2)))
    >>> model(jnp.zeros((1, 16), int)).shape
    (1, 16, 256)

    Parameters are split over `tensor` (heads, feed-forward features, vocabulary) and `expert`, and replicated over the
    other axes: every device runs all layers. `trellax.pipeline.split_transformer` splits layers over `pipe`.

    Args:
        mesh: mesh that holds the parameters; the first device alone if left out.
        dtype: dtype of the parameters and of the computation; `config.dtype` if left out.
        axes: roles of the mesh's axes, `spec.roles`, if they have names of their own.
        weights: whether the weights of a run are those of its last step or their average.

    Raises:
        TrellaxError: there is no model, or it does not fit the mesh; no weight is read then.
    """
    check_choice("dtype", dtype, (None, "float32", "bfloat16"), error=ConfigError)
    check_weights(weights)
    config = read_model_config(folder)
    config = replace(config, dtype=dtype or config.dtype)
    mesh = build_mesh(MeshSpec(), devices=jax.devices()[:1]) if mesh is None else mesh
    rules = model_rules(config, mesh.shape, rules=ShardingRules.of(axes))
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), rules=rules))
    params = load_params(folder, _param_shapes(model, config, rules, mesh), weights=weights)
    ends = {name: params.get(name, {}) for name in ("embed", "head")}
    nnx.update(model, params | pad_tables(ends, rules=rules, mesh=mesh))
    return model


def _param_shapes(model: Transformer, config: ModelConfig, rules: ShardingRules, mesh: Mesh) -> Any:
    """Return the shapes, dtypes and shardings of the parameters of a model that has none yet."""

    def place(path: Any, dims: tuple[str, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = natural_sharding(path, dims, leaf, rules=rules, mesh=mesh)
        kind = param_dtype(dims, config.dtype)
        return jax.ShapeDtypeStruct(leaf.shape, kind, sharding=sharding)

    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree_util.tree_map_with_path(place, param_dims(model), shapes, is_leaf=lambda x: isinstance(x, tuple))
