"""The state of a run in the natural order of its layers, by path: what a checkpoint holds, whatever the mesh.

Stage parameters [chunks, ranks, layers, ...] become [all layers, ...] and back. `store.py` saves and restores it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ...meshes.rules import split_first_free_dim
from ...pipeline import PipelineParams, natural_order, stages_from_layers
from ..state import Setup, TrainState

Arrays = Mapping[str, jax.Array]
Shapes = Mapping[str, jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class NaturalState:
    """The two ways between a run's state and its saved form, each compiled once."""

    setup: Setup

    @cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Every saved array as this run's mesh wants it: shape, type and sharding by path."""
        shapes = jax.eval_shape(self._merge, self.setup.shapes)
        return by_path(jax.tree.map(_place, shapes, self._shardings))

    def from_state(self, state: TrainState) -> Arrays:
        """Return the arrays of a state by path, as copies that outlive it."""
        return self._take(state)

    def to_state(self, arrays: Arrays) -> TrainState:
        """Return the state made of saved arrays; consumes them where their memory can be reused."""
        return self._put(dict(arrays))

    @cached_property
    def params(self) -> PipelineParams:
        """Shapes and shardings of the parameters alone, blocks [L, ...]."""
        shapes = jax.eval_shape(self._merge_params, self.setup.model.params)
        return jax.tree.map(_place, shapes, self._shardings.params)

    def to_params(self, params: PipelineParams) -> PipelineParams:
        """Return parameters of natural order cut into the run's stages; they are given up."""
        own = self.setup.model.shardings
        return jax.jit(self._cut_params, out_shardings=own, donate_argnums=self._donated)(params)

    @cached_property
    def _take(self) -> Any:
        own = {path: leaf.sharding for path, leaf in self.shapes.items()}
        return jax.jit(lambda state: by_path(self._merge(state)), out_shardings=own)

    @cached_property
    def _put(self) -> Any:
        structure = jax.tree.structure(jax.eval_shape(self._merge, self.setup.shapes))

        def put(arrays: Arrays) -> TrainState:
            saved = jax.tree.unflatten(structure, [arrays[path] for path in self.shapes])
            health = replace(saved.health, halted=jnp.zeros((), jnp.bool_))
            return replace(map_params(self._cut_params, saved), health=health)

        return jax.jit(put, out_shardings=self.setup.shardings, donate_argnums=self._donated)

    @property
    def _donated(self) -> tuple[int, ...]:
        # Padded stages are larger than what they are made of, so they cannot take its place in memory.
        return () if self.setup.model.fns.layers_per_stage else (0,)

    def _merge(self, state: TrainState) -> TrainState:
        # A run that was halted starts again with the state it was halted at.
        return replace(map_params(self._merge_params, state), health=replace(state.health, halted=None))

    def _merge_params(self, params: PipelineParams) -> PipelineParams:
        counts = self.setup.model.fns.layers_per_stage
        return PipelineParams(stages=natural_order(params.stages, layers_per_stage=counts), shared=params.shared)

    def _cut_params(self, params: PipelineParams) -> PipelineParams:
        num_chunks, num_ranks = jax.tree.leaves(self.setup.model.params.stages)[0].shape[:2]
        stages = stages_from_layers(
            params.stages,
            num_ranks=num_ranks,
            num_chunks=num_chunks,
            layers_per_stage=self.setup.model.fns.layers_per_stage,
        )
        return PipelineParams(stages=stages, shared=params.shared)

    @cached_property
    def _shardings(self) -> TrainState:
        def natural(shardings: PipelineParams) -> PipelineParams:
            stages = jax.tree.map(self._merge_sharding, shardings.stages, self.setup.model.params.stages)
            return PipelineParams(stages=stages, shared=shardings.shared)

        own = self.setup.shardings
        return replace(map_params(natural, own), health=replace(own.health, halted=None))

    def _merge_sharding(self, sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        mesh = self.setup.mesh
        _chunk, rank, _layer, *rest = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
        if self.setup.config.model.num_layers % mesh.shape["pipe"] == 0:
            return NamedSharding(mesh, PartitionSpec(rank, *rest))
        # As many layers as these no axis of the mesh divides: another dimension is split over pipe in their place.
        size = mesh.shape["pipe"]
        spec = split_first_free_dim(PartitionSpec(*rest), shape=leaf.shape[3:], axis="pipe", size=size)
        return NamedSharding(mesh, PartitionSpec(None, *spec))


@lru_cache(maxsize=2)
def natural_state(setup: Setup) -> NaturalState:
    """Return the way between this run's state and its saved form; the same one again for the same run."""
    return NaturalState(setup)


def natural_params(setup: Setup) -> PipelineParams:
    """Return shapes and shardings of a run's parameters as checkpoints have them: in natural order, stages [L, ...]."""
    return natural_state(setup).params


def params_from_natural(setup: Setup, params: PipelineParams) -> PipelineParams:
    """Return parameters of natural order cut into the run's stages; they are given up."""
    return natural_state(setup).to_params(params)


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path.

    Flat names do not depend on the classes of optax or of ours, so a save outlives their changes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def map_params(change: Any, tree: Any) -> Any:
    """Return the tree with `change` made to every copy of the parameter tree: parameters and optimizer moments."""

    def is_params(node: Any) -> bool:
        return isinstance(node, PipelineParams)

    return jax.tree.map(lambda node: change(node) if is_params(node) else node, tree, is_leaf=is_params)


def _place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
