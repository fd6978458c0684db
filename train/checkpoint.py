"""Saved runs, with Orbax: layers in their natural order, so that any mesh can read what any mesh wrote.

The only file that knows Orbax. A checkpoint is `<run folder>/checkpoints/<step>` with every array under its path and a
JSON record of the config.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from ..meshes import CheckpointError
from ..pipeline import PipelineParams, natural_order, stages_from_layers
from .config import RunConfig
from .state import Setup, TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The saves of one run folder; use as a context manager, which waits for a save under way.

    Args:
        keep: how many of the newest saves to keep.
    """

    def __init__(self, run_folder: str | Path, *, keep: int) -> None:
        policy: Any = ocp.training.preservation_policies.LatestN(keep)
        # Orbax wants an absolute path.
        self._folder = str((Path(run_folder) / FOLDER).absolute())
        # cleanup removes what a killed save left behind.
        self._orbax = ocp.training.Checkpointer(self._folder, preservation_policy=policy, cleanup_tmp_directories=True)

    @property
    def latest_step(self) -> int | None:
        """Steps taken at the newest save, or None without one."""
        return None if self._orbax.latest is None else int(self._orbax.latest.step)

    def save(self, state: TrainState, setup: Setup) -> None:
        """Save the state under its step, over a save of the same step."""
        arrays = jax.jit(_to_natural(setup), out_shardings=_natural_shardings(setup))(state)
        meta = {"config": setup.config.model_dump(mode="json")}
        items = {"state": _by_path(arrays), "meta": meta}
        self._orbax.save_checkpointables(int(state.step), items, overwrite=True)

    def restore(self, setup: Setup) -> TrainState:
        """Return the newest saved state, placed as this run's mesh wants it.

        Raises:
            CheckpointError: there is none, or it is of another model or optimizer.
        """
        shapes = _natural_shapes(setup)
        wanted = _by_path(shapes)
        step = self._newest()
        if not any(path.startswith("opt_state.") for path in self._saved_paths(step)):
            return setup.state_of(params_from_natural(setup, self.restore_params(shapes.params)))
        self._check(step, wanted)
        loaded = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        paths = [_path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
        arrays = jax.tree.unflatten(jax.tree.structure(shapes), [loaded[path] for path in paths])
        # Padded stages are larger than what they are made of, so they cannot take its place in memory.
        donated = () if setup.model.fns.layers_per_stage else (0,)
        return jax.jit(_from_natural(setup), out_shardings=setup.shardings, donate_argnums=donated)(arrays)

    def save_params(self, params: PipelineParams, config: RunConfig) -> None:
        """Save parameters in natural order, blocks [L, ...], as those of a run before its first step.

        `restore` gives such a run a fresh optimizer.
        """
        meta = {"config": config.model_dump(mode="json")}
        self._orbax.save_checkpointables(0, {"state": _by_path({"params": params}), "meta": meta}, overwrite=True)

    def restore_params(self, shapes: PipelineParams) -> PipelineParams:
        """Return the parameters alone of the newest save, in natural order, as these shapes and shardings say.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        step, wanted = self._newest(), _by_path({"params": shapes})
        self._check(step, wanted)
        only_these = ocp.Context()
        only_these.pytree.loading.partial_load = True
        with only_these:
            loaded = self._orbax.load_checkpointables(step, {"state": wanted})["state"]
        return jax.tree.unflatten(jax.tree.structure(shapes), [loaded[path] for path in wanted])

    def saved_config(self) -> dict[str, Any]:
        """Return the config that the newest save was made with, as plain nested dicts.

        Raises:
            CheckpointError: there is no save.
        """
        return self._orbax.load_checkpointables(self._newest(), {"meta": None})["meta"]["config"]

    def _newest(self) -> int:
        if (step := self.latest_step) is None:
            raise CheckpointError(f"{self._folder} holds no checkpoint.", fix="train from the start.")
        return step

    def _saved_paths(self, step: int) -> Mapping[str, Any]:
        return self._orbax.checkpointables_metadata(step).metadata["state"]

    def _check(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        saved = self._saved_paths(step)
        if all(path.startswith("params.") for path in wanted):
            saved = {path: leaf for path, leaf in saved.items() if path.startswith("params.")}
        here = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
        there = {path: tuple(leaf.shape) for path, leaf in saved.items()}
        differ = [path for path in sorted(here.keys() | there.keys()) if here.get(path) != there.get(path)]
        if differ:
            # The optimizer's arrays follow the parameters': they are only news where the parameters agree.
            news = [path for path in differ if path.startswith("params")] or differ
            shown = "".join(
                f"\n  {path}: saved {_shape_text(there.get(path))}, wanted {_shape_text(here.get(path))}"
                for path in news[:5]
            )
            more = f"\n  and {len(news) - 5} more" if len(news) > 5 else ""
            raise CheckpointError(
                f"{self._folder}/{step} is of another model or optimizer: {len(differ)} arrays differ.{shown}{more}",
                fix="use the config it was saved with, another run.name, or --checkpoint.resume never.",
            )

    def close(self) -> None:
        """Wait for the save under way and let go of the folder."""
        self._orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _by_path(tree: Any) -> dict[str, Any]:
    """Flat names do not depend on the classes of optax or of ours, so a save outlives their changes."""
    return {_path_text(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path_text(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _map_params(change: Any, tree: Any) -> Any:
    """Apply `change` to every copy of the parameter tree: the parameters and the optimizer's moments."""

    def is_params(node: Any) -> bool:
        return isinstance(node, PipelineParams)

    return jax.tree.map(lambda node: change(node) if is_params(node) else node, tree, is_leaf=is_params)


def _to_natural(setup: Setup) -> Any:
    counts = setup.model.fns.layers_per_stage

    def merge(params: PipelineParams) -> PipelineParams:
        return PipelineParams(stages=natural_order(params.stages, layers_per_stage=counts), shared=params.shared)

    return lambda state: _map_params(merge, state)


def natural_params(setup: Setup) -> PipelineParams:
    """Return shapes and shardings of a run's parameters as checkpoints have them: in natural order, stages [L, ...]."""
    return _natural_shapes(setup).params


def params_from_natural(setup: Setup, params: PipelineParams) -> PipelineParams:
    """Return parameters of natural order cut into the run's stages; they are given up."""
    donated = () if setup.model.fns.layers_per_stage else (0,)
    return jax.jit(_from_natural(setup), out_shardings=setup.model.shardings, donate_argnums=donated)(params)


def _from_natural(setup: Setup) -> Any:
    num_chunks, num_ranks = jax.tree.leaves(setup.model.params.stages)[0].shape[:2]
    counts = setup.model.fns.layers_per_stage

    def cut(params: PipelineParams) -> PipelineParams:
        stages = stages_from_layers(params.stages, num_ranks=num_ranks, num_chunks=num_chunks, layers_per_stage=counts)
        return PipelineParams(stages=stages, shared=params.shared)

    return lambda state: _map_params(cut, state)


def _natural_shardings(setup: Setup) -> TrainState:
    num_ranks = setup.mesh.shape["pipe"]

    def merge(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        _chunk, rank, _layer, *rest = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
        if setup.config.model.num_layers % num_ranks == 0:
            return NamedSharding(setup.mesh, PartitionSpec(rank, *rest))
        # As many layers as these no axis of the mesh divides: another dimension is split over pipe in their place.
        free = [dim for dim, axis in enumerate(rest) if axis is None and leaf.shape[3 + dim] % num_ranks == 0]
        rest = ["pipe" if dim == min(free, default=-1) else axis for dim, axis in enumerate(rest)]
        return NamedSharding(setup.mesh, PartitionSpec(None, *rest))

    def natural(shardings: PipelineParams) -> PipelineParams:
        stages = jax.tree.map(merge, shardings.stages, setup.model.params.stages)
        return PipelineParams(stages=stages, shared=shardings.shared)

    return _map_params(natural, setup.shardings)


def _natural_shapes(setup: Setup) -> TrainState:
    shapes = jax.eval_shape(_to_natural(setup), setup.shapes)
    return jax.tree.map(
        lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), shapes, _natural_shardings(setup)
    )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(np.array(shape, int).tolist()))
