"""Convert the state of a run to arrays in layer order, by path, and back, so that a save does not depend on the mesh.

A pipeline holds stage parameters [chunks, ranks, layers, ...]; a checkpoint holds [all layers, ...] in the order of the
model. For 6 layers on 2 ranks with 1 chunk, leaf w[1, 2, 3, ...] is saved as w[6, ...], so 3 ranks can read it as
w[1, 3, 2, ...]. Tables that are padded for the mesh are saved without padding (`../../layers/vocabulary.py`).
Parameters and the optimizer's moments are converted alike; `checkpoints.py` saves them.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ...hub.saves.paths import leaves_by_path
from ...hub.saves.reader import Arrays
from ...hub.saves.seal import PARAMS
from ...layers.experts.kinds import layer_kinds, layers_by_kind
from ...layers.vocabulary import is_table, resize_tables, whole_words_sharding
from ...meshes.host_memory import HOST, in_host_memory, is_in_host_memory, to_device, to_host
from ...meshes.rules import split_first_free_dim
from ...pipeline import PipelineParams
from ...pipeline.model.stack import cut_kind, merge_kind
from ..state import Setup, TrainState, without_moments
from ..update.offload import join_params, map_params


@dataclass(frozen=True)
class LayerOrder:
    """The conversion of the state of a run to saved arrays and back; each direction is compiled once."""

    setup: Setup

    @cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape, type and sharding of every saved array, by path, as this run's mesh splits it."""
        shapes = jax.eval_shape(self._merge, _without_shardings(self.setup.shapes))
        return leaves_by_path(jax.tree.map(_place, shapes, self._shardings))

    def from_state(self, state: TrainState) -> Arrays:
        """Return the arrays of a state by path, as copies: the state may be donated afterwards."""
        if not self.setup.is_offloaded:
            return self._take(state)
        moments = map_params(partial(self._move, self._merge_params), state.opt_state, self._shardings.opt_state)
        return leaves_by_path({"opt_state": moments}) | self._take(without_moments(state))

    def to_state(self, arrays: Arrays) -> TrainState:
        """Return the state of saved arrays, which are donated if their memory can be reused."""
        if not self.setup.is_offloaded:
            return self._put(dict(arrays))
        state = self._put({path: leaf for path, leaf in arrays.items() if not is_in_host_memory(leaf)})
        saved = jax.tree.unflatten(self._structure, [arrays[path] for path in self.shapes]).opt_state
        moments = map_params(partial(self._move, self._cut_params), saved, self.setup.shardings.opt_state)
        return replace(state, opt_state=join_params(moments, state.opt_state))

    @cached_property
    def saved(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of what a save holds: all arrays but frozen parameters, which `train.init_from` has."""
        return {path: leaf for path, leaf in self.shapes.items() if not self._is_frozen(path)}

    def _is_frozen(self, path: str) -> bool:
        frozen = self.setup.model.fns.frozen
        return frozen is not None and path.startswith(PARAMS) and frozen(path.removeprefix(PARAMS))

    @cached_property
    def params(self) -> PipelineParams:
        """Shapes and shardings of the parameters alone, stages [L, ...]."""
        shapes = jax.eval_shape(self._merge_params, self.setup.model.params)
        return jax.tree.map(_place, shapes, self._shardings.params)

    def to_params(self, params: PipelineParams) -> PipelineParams:
        """Return parameters in layer order cut into the run's stages; they are donated."""
        own = self.setup.model.shardings
        return jax.jit(self._cut_params, out_shardings=own, donate_argnums=self._donated)(params)

    @cached_property
    def _take(self) -> Any:
        own = {path: leaf.sharding for path, leaf in self.saved.items() if not is_in_host_memory(leaf)}

        def take(state: TrainState) -> Arrays:
            return {path: leaf for path, leaf in leaves_by_path(self._merge(state)).items() if path in own}

        return jax.jit(take, out_shardings=own)

    @cached_property
    def _put(self) -> Any:
        def put(arrays: Arrays) -> TrainState:
            saved = jax.tree.unflatten(self._structure, [arrays.get(path) for path in self.shapes])
            health = replace(saved.health, halted=jnp.zeros((), jnp.bool_))
            saved = without_moments(saved) if self.setup.is_offloaded else saved
            return replace(map_params(self._cut_params, saved), health=health)

        own = without_moments(self.setup.shardings) if self.setup.is_offloaded else self.setup.shardings
        return jax.jit(put, out_shardings=own, donate_argnums=self._donated)

    @cached_property
    def _structure(self) -> Any:
        # `shapes` has the paths in the order of this tree's leaves.
        return jax.tree.structure(jax.eval_shape(self._merge, _without_shardings(self.setup.shapes)))

    def _move(self, convert: Any, moments: PipelineParams, shardings: PipelineParams) -> PipelineParams:
        """Return moments in host memory converted one array at a time: all at once may not fit the devices."""

        def of_stages(path: Any, leaf: jax.Array, own: NamedSharding) -> Any:
            # Its first name is that of its kind, if layers are of several kinds.
            name = path[0].key
            return self._program(convert, own)(PipelineParams(stages={name: leaf}, shared={})).stages[name]

        def of_shared(path: Any, leaf: jax.Array, own: NamedSharding) -> Any:
            name = path[-1].key
            return self._program(convert, own)(PipelineParams(stages={}, shared={name: leaf})).shared[name]

        return PipelineParams(
            stages=jax.tree_util.tree_map_with_path(of_stages, moments.stages, shardings.stages),
            shared=jax.tree_util.tree_map_with_path(of_shared, moments.shared, shardings.shared),
        )

    def _program(self, convert: Any, sharding: NamedSharding) -> Any:
        key = (convert.__name__, sharding)
        if key not in self._programs:

            def move(given: PipelineParams) -> PipelineParams:
                return jax.tree.map(to_host, convert(jax.tree.map(to_device, given)))

            self._programs[key] = jax.jit(move, out_shardings=sharding)
        return self._programs[key]

    @cached_property
    def _programs(self) -> dict[Any, Any]:
        return {}

    @property
    def _donated(self) -> tuple[int, ...]:
        # Uneven stages and tables are padded, so they are larger than the saved arrays and cannot reuse their memory.
        # Neither can layers that move to another rank.
        is_reshape = not self.setup.model.fns.layers_per_stage and self.setup.placement.is_loop
        return (0,) if is_reshape and self._num_rows == self._num_words else ()

    @property
    def _num_words(self) -> int:
        return self.setup.config.model.vocab_size

    @property
    def _num_rows(self) -> int:
        return self.setup.model.params.shared["embed"]["table"].shape[0]

    def _merge(self, state: TrainState) -> TrainState:
        # A halted run resumes from the state at which it was halted, with the flag cleared.
        return replace(map_params(self._merge_params, state), health=replace(state.health, halted=None))

    def _merge_params(self, params: PipelineParams) -> PipelineParams:
        merge = partial(merge_kind, placement=self.setup.placement)
        shared = resize_tables(params.shared, self._num_words)
        return PipelineParams(stages=self._by_kind(merge, params.stages), shared=shared)

    def _cut_params(self, params: PipelineParams) -> PipelineParams:
        cut = partial(cut_kind, placement=self.setup.placement)
        shared = resize_tables(params.shared, self._num_rows)
        return PipelineParams(stages=self._by_kind(cut, params.stages), shared=shared)

    def _by_kind(self, convert: Any, stages: Any) -> Any:
        """Return convert(leaf, counts=layers of its kind on each stage) of every leaf; kinds may be left out."""
        # Muon's state has a copy for the parameters that it does not update: without arrays.
        if not jax.tree.leaves(stages):
            return stages
        counts = layers_by_kind(self.setup.config.model, self.setup.layers_per_stage)
        if "" in counts:
            return jax.tree.map(partial(convert, counts=counts[""]), stages)
        return {kind: jax.tree.map(partial(convert, counts=counts[kind]), own) for kind, own in stages.items()}

    @cached_property
    def _shardings(self) -> TrainState:
        shapes = dict(jax.tree_util.tree_leaves_with_path(self.setup.model.params.stages))
        num_layers = {kind.name: kind.num_layers for kind in layer_kinds(self.setup.config.model)}

        # By path: moments of one of two optimizers lack the parameters of the other.
        def merge(shardings: PipelineParams) -> PipelineParams:
            def one(path: Any, own: NamedSharding) -> NamedSharding:
                return self._merge_sharding(own, shapes[path], num_layers.get(path[0].key, num_layers.get("", 0)))

            stages = jax.tree_util.tree_map_with_path(one, shardings.stages)
            shared = jax.tree_util.tree_map_with_path(self._merge_shared_sharding, shardings.shared)
            return PipelineParams(stages=stages, shared=shared)

        own = self.setup.shardings
        return replace(map_params(merge, own), health=replace(own.health, halted=None))

    def _merge_shared_sharding(self, path: Any, sharding: NamedSharding) -> NamedSharding:
        if not is_table(path):
            return sharding
        leaf = dict(jax.tree_util.tree_leaves_with_path(self.setup.model.params.shared))[path]
        return whole_words_sharding(sharding, (self._num_words, *leaf.shape[1:]))

    def _merge_sharding(self, sharding: NamedSharding, leaf: jax.ShapeDtypeStruct, num_layers: int) -> NamedSharding:
        # [chunks, ranks@pipe, layers, D, F@tensor] becomes [L@pipe, D, F@tensor].
        mesh, pipe = self.setup.mesh, self.setup.sizes.roles.pipe
        _chunk, rank, _layer, *rest = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
        merged = NamedSharding(mesh, PartitionSpec(rank, *rest))
        if num_layers % mesh.shape[pipe]:
            # 7 layers do not split over 2 ranks: the first dimension that does is split over pipe instead.
            spec = split_first_free_dim(PartitionSpec(*rest), shape=leaf.shape[3:], axis=pipe, size=mesh.shape[pipe])
            merged = NamedSharding(mesh, PartitionSpec(None, *spec))
        return in_host_memory(merged) if sharding.memory_kind == HOST else merged


@lru_cache(maxsize=2)
def layer_order(setup: Setup) -> LayerOrder:
    """Return the conversion for a setup, cached for the last two setups."""
    return LayerOrder(setup)


def params_in_layer_order(setup: Setup) -> PipelineParams:
    """Return shapes and shardings of a run's parameters as checkpoints hold them, stages [L, ...]."""
    return layer_order(setup).params


def params_in_stages(setup: Setup, params: PipelineParams) -> PipelineParams:
    """Return parameters in layer order cut into the run's stages; they are donated."""
    return layer_order(setup).to_params(params)


def as_model(params: PipelineParams) -> dict[str, Any]:
    """Return parameters in layer order as a model groups them: {"embed", "blocks", "head"}."""
    return {"blocks": params.stages, **params.shared}


def as_pipeline(params: dict[str, Any]) -> PipelineParams:
    """Return a model's parameters as a pipeline groups them, still in layer order."""
    return PipelineParams(stages=params["blocks"], shared={"embed": params["embed"], "head": params.get("head", {})})


def _without_shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
