"""Flax's partitioning metadata: written on our layers' parameters, and read to place any NNX model on a mesh.

A parameter carries the names of its dimensions where Flax's own tools look for them, in `out_sharding`, as
`nnx.with_partitioning` writes it. Beside it stand the rules that turn names into mesh axes, so that
`nnx.get_partition_spec(nnx.state(model))` gives the specs that `ShardingRules` would.

    kernel of ColumnLinear(4, 8, dim="ffn")     out_sharding ("embed", "ffn")  ->  PartitionSpec(None, "tensor")

Read `linear.py` next, which makes such parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from ..meshes import DEFAULT_RULES, MeshError, ModelError, ShardingError, ShardingRules
from ..meshes.arguments import check_count, check_instance, check_number

ModelT = TypeVar("ModelT", bound=nnx.Module)

Dims = tuple[str | tuple[str, ...] | None, ...]

INIT_STD = 0.02
"""Standard deviation of initial weights (Radford et al. 2019, GPT-2's code)."""


def make_param(
    key: jax.Array, shape: tuple[int, ...], dims: tuple[str, ...], *, std: float, rules: ShardingRules = DEFAULT_RULES
) -> nnx.Param:
    """Return a float32 parameter drawn from a normal distribution, annotated with its logical dimensions.

    `std` 0 gives zeros. The values do not depend on the mesh.

    Raises:
        ModelError: a dimension is negative or not a whole number, or `std` is not a finite number of 0 or more.
    """
    for size in shape:
        check_count("shape", size, error=ModelError, least=0)
    check_number("std", std, error=ModelError)
    value = jax.random.normal(key, shape, jnp.float32) * std if std else jnp.zeros(shape, jnp.float32)
    return nnx.Param(value, **param_metadata(dims, rules))


def param_dtype(dims: Sequence[str], dtype: str) -> str:
    """Return the dtype of a parameter for inference in a dtype, by its dimensions.

    Weights of routers stay in float32, as in training: rounded ones would choose other experts.
    """
    return "float32" if "router" in dims else dtype


def param_metadata(dims: tuple[str, ...], rules: ShardingRules = DEFAULT_RULES) -> dict[str, Any]:
    """Return the metadata of a parameter whose dimensions have these names, for `nnx.Param(value, **metadata)`.

    Eager sharding is off: with it Flax would demand a mesh to build a layer on, and move each parameter as it is made.
    The rules are those of the parameter's own dimensions, and of "layer", which a stack of layers adds.
    """
    own = tuple(rule for rule in rules.table if rule[0] in (*dims, "layer"))
    return {"out_sharding": dims, "sharding_rules": own, "eager_sharding": False}


def place_model(model: ModelT, *, mesh: Mesh | AbstractMesh, rules: ShardingRules = DEFAULT_RULES) -> ModelT:
    """Return the model with every array on the mesh, each split as its own annotation says.

    Annotations are Flax's: `nnx.with_partitioning(init, ("embed", "ffn"))` or `kernel_metadata={"out_sharding": ...}`.
    A name is a logical dimension of `rules`, or a mesh axis. What has no annotation is replicated. Rules of a
    parameter's own (`sharding_rules`, which our layers carry) come before `rules`. A model of shapes, from
    `nnx.eval_shape`, comes back as shapes with shardings: nothing is allocated.

    >>> with nnx.use_eager_sharding(False):
    ...     init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "ffn"))
    ...     model = nnx.Linear(16, 64, kernel_init=init, rngs=nnx.Rngs(0))
    >>> placed = place_model(model, mesh=build_mesh(MeshSpec(tensor=8)))
    >>> placed.kernel[...].sharding.spec
    P(None, 'tensor')

    Raises:
        ModelError: `model` is not an NNX module.
        MeshError: the model has arrays, and the mesh has no devices.
        ShardingError: a name is neither in the rules nor an axis of the mesh, an axis splits an array twice, a
            dimension is not a multiple of the devices that it is split over, or the mesh has an axis that `rules` do
            not know, `ShardingRules.of`.
    """
    graph, state = _split(model)
    return nnx.merge(graph, jax.tree.map(_place, state, _shardings(state, mesh, rules)))


def init_model(build: Callable[[], ModelT], *, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> ModelT:
    """Return the model that `build` makes, every array born on the mesh: no device ever holds a whole split one.

    `build` is compiled, so it makes its own `nnx.Rngs`. Annotations are read as by `place_model`. The values do not
    depend on the mesh.

    >>> model = init_model(lambda: MyModel(rngs=nnx.Rngs(0)), mesh=build_mesh(MeshSpec(tensor=8)))

    Raises:
        ModelError: `build` does not make an NNX module.
        ShardingError: as `place_model` does.
    """
    # Flax would read logical names as mesh axes while it builds; here the rules are applied to the outputs.
    with nnx.use_eager_sharding(False):
        graph, shapes = _split(nnx.eval_shape(build))
        born = jax.jit(lambda: nnx.split(build())[1], out_shardings=_shardings(shapes, mesh, rules))
        return nnx.merge(graph, born())


def _split(model: ModelT) -> tuple[nnx.GraphDef[ModelT], nnx.State]:
    check_instance("model", model, nnx.Module, error=ModelError, fix="give a flax.nnx.Module, not its state.")
    return nnx.split(model)


def _shardings(state: nnx.State, mesh: Mesh | AbstractMesh, rules: ShardingRules) -> Any:
    """Return the sharding of every array, in a tree like the state's."""

    def one(path: Any, variable: nnx.Variable[Any]) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.tree.map(lambda leaf: _sharding_of(name, variable, leaf.shape, mesh, rules), variable)

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _sharding_of(
    name: str, variable: nnx.Variable[Any], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, rules: ShardingRules
) -> NamedSharding:
    metadata = variable.get_metadata()
    own = metadata.get("out_sharding") or ()
    if isinstance(own, NamedSharding):
        own = own.spec
    # A spec may leave out trailing dimensions, as jax's own do.
    dims: Dims = (*own, *[None] * (len(shape) - len(own)))
    known = _rules_on(mesh, rules.replace(**dict(metadata.get("sharding_rules") or ())))
    try:
        known.check(dims, shape=shape, sizes=mesh.shape, name=name)
        return NamedSharding(mesh, known.spec(dims))
    except ShardingError as error:
        # Errors about names and axes do not know which parameter they come from.
        where = "" if error.problem.startswith(name) else f"{name}: "
        raise ShardingError(f"{where}{error.problem}", fix=error.fix) from None


def _rules_on(mesh: Mesh | AbstractMesh, rules: ShardingRules) -> ShardingRules:
    """Return the rules without axes that the mesh lacks, and with every mesh axis as a name for itself."""
    table = {dim: tuple(axis for axis in rules.axes(dim) if axis in mesh.shape) for dim, _ in rules.table}
    axes = {axis: axis for axis in mesh.axis_names if axis not in table}
    return replace(rules, table=tuple({**table, **axes}.items()))


def _place(leaf: Any, sharding: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if isinstance(sharding.mesh, AbstractMesh):
        raise MeshError(
            f"the model has arrays, a {leaf.dtype}{list(leaf.shape)} among them, but the mesh has no devices.",
            fix="use build_mesh(...), or place the shapes that nnx.eval_shape makes.",
        )
    return jax.device_put(leaf, sharding)
