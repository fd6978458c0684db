"""Make a module of a class of the user's, with the partition specs that our rules give to its dims."""

from typing import Any

import jax
from flax import nnx

from ...meshes import ModelError, ShardingError, ShardingRules
from ...meshes.errors import suggest
from ..partitioning import param_metadata
from .check_config import own_dims
from .load import load_class
from .mistakes import code_of


def add_dims(rules: ShardingRules, config: Any) -> ShardingRules:
    """Return the rules with the dims that a `ModelConfig` adds for classes of the user's.

    Raises:
        ShardingError: a dim has a rule of trellax already.
    """
    table = dict(rules.table)
    axes = {"none": (), "tensor": rules.mesh_axes.having("tensor")}
    for dim, role in own_dims(config).items():
        if dim in table and rules.axes(dim) != axes[role]:
            raise ShardingError(
                f"model.dims has {dim}={role}, but {dim!r} is a dim of trellax's own layers.",
                fix="choose another name.",
            )
        rules = rules.replace(**{dim: axes[role] or None})
    return rules


def make_own(config: Any, key: str, *, rngs: nnx.Rngs, rules: ShardingRules) -> Any:
    """Return a module of the class that a field of the config names, its parameters annotated by the rules.

    Args:
        key: the field, one of `OWN_CLASSES`.

    Raises:
        ModelError: the class cannot be loaded, or its module has state that is no parameter.
        ShardingError: a parameter does not name its dims, or one of them has no rule.
    """
    own, rules = load_class(getattr(config, key), key=key), add_dims(rules, config)
    # Flax would read the names of dims as mesh axes, and ask for a mesh.
    with nnx.use_eager_sharding(False), code_of(own):
        module = own(config, rngs=rngs, rules=rules)
    for path, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Variable):
            _annotate(variable, name=f"{own.__name__}.{'.'.join(map(str, path))}", rules=rules)
    if key == "block" and not nnx.to_flat_state(nnx.state(module, nnx.Param)):
        raise ModelError(
            f"model.block={getattr(config, key)!r}: {own.__name__} has no parameters, so there are no layers to split.",
            fix="give it some, nnx.Param or layers such as ColumnLinear.",
        )
    return module


def _annotate(variable: Any, *, name: str, rules: ShardingRules) -> None:
    if not isinstance(variable, nnx.Param):
        raise ModelError(
            f"{name} is a {type(variable).__name__}: a layer has parameters (nnx.Param) alone.",
            fix="keep no state in it. Random keys are info.keys() of a block whose call asks for info.",
        )
    dims, shape = variable.get_metadata().get("out_sharding"), jax.numpy.shape(variable[...])
    if not isinstance(dims, tuple) or len(dims) != len(shape):
        raise ShardingError(
            f"{name} is {list(shape)} and names the dims {dims}: each of its dimensions needs a name, which says "
            "whether devices split it.",
            fix=f"nnx.Param(value, out_sharding=({', '.join(['...'] * len(shape))})), layers.partitioning.make_param, "
            "or layers such as ColumnLinear.",
        )
    try:
        rules.spec(dims)
    except ShardingError as error:
        unknown = [dim for dim in dims if isinstance(dim, str) and dim not in dict(rules.table)]
        if not unknown:
            raise ShardingError(f"{name}: {error.problem}", fix=error.fix) from None
        raise ShardingError(
            f"{name} has the dim {unknown[0]!r}, which has no rule.{suggest(unknown[0], list(dict(rules.table)))}",
            fix=f'add it to the config: model.dims=["{unknown[0]}=tensor"], or =none where every device has all of it.',
        ) from None
    variable.set_metadata(**param_metadata(dims, rules))
