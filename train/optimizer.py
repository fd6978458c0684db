"""Build AdamW with warm-up, cosine decay and clipping by the global norm, and shard its state (ZeRO-1).

AdamW is algorithm 2 of Loshchilov and Hutter 2019; the decay follows a half cosine as in Loshchilov and Hutter 2017
("SGDR"), equation 5, without restarts; clipping is algorithm 1 of Pascanu et al. 2013. Read `step.py` for the use.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..configs.run_config import OptimizerSection
from ..meshes import ConfigError
from ..meshes.arguments import check_count
from ..meshes.rules import split_first_free_dim
from ..pipeline import PipelineParams

_DECAYED = ("kernel", "table", "positions")
"""Names of matrices, which have weight decay; norm scales and biases have none."""

_STACKED_DIMS = 3
"""Number of leading dimensions of a stage parameter: [chunks, ranks, layers, ...]."""


def make_learning_rate(section: OptimizerSection, *, steps: int, peak: Any = None) -> Callable[[Any], Any]:
    """Return a function step -> learning rate: linear warm-up, then cosine decay to `min_lr_ratio` of the peak.

    Args:
        peak: the peak learning rate float32[], if it is an input of the program; the section's if left out.

    Raises:
        ConfigError: there are no steps.
    """
    check_count("steps", steps, error=ConfigError)
    peak = section.learning_rate if peak is None else peak
    fraction = optax.warmup_cosine_decay_schedule(
        # Not from 0, with which the first step would change nothing.
        init_value=1 / (section.warmup_steps + 1),
        peak_value=1.0,
        warmup_steps=section.warmup_steps,
        decay_steps=max(steps, section.warmup_steps + 1),
        end_value=section.min_lr_ratio,
    )
    return lambda step: peak * fraction(step)


def make_optimizer(section: OptimizerSection, *, steps: int, peak: Any = None) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW with weight decay on matrices; `peak` as in `make_learning_rate`.

    Raises:
        ConfigError: there are no steps.
    """
    adamw = optax.adamw(
        make_learning_rate(section, steps=steps, peak=peak),
        b1=section.beta1,
        b2=section.beta2,
        eps=section.epsilon,
        weight_decay=section.weight_decay,
        mask=_is_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(section.clip_norm), adamw)


def split_over_data(shardings: PipelineParams, shapes: PipelineParams, *, axes: tuple[str, ...]) -> PipelineParams:
    """Return the shardings with the first free dimension that divides evenly split over the batch axes, everywhere.

    kernel[chunks, ranks@pipe, layers, D, F@tensor] -> kernel[chunks, ranks@pipe, layers, D@data, F@tensor]

    This is ZeRO stage 1 (Rajbhandari et al. 2020, section 5.1) for optimizer moments, which have the shapes of the
    parameters. It divides their memory by the size of `data`.

    Args:
        axes: the batch axes of the mesh.
    """

    def split(lead: int) -> Any:
        def one(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            size = math.prod(sharding.mesh.shape[axis] for axis in axes)
            spec = split_first_free_dim(sharding.spec, shape=leaf.shape, axis=axes, size=size, start=lead)
            return NamedSharding(sharding.mesh, spec)

        return one

    # Never a stack dimension: to slice it XLA would gather the whole stack ("Involuntary full rematerialization").
    return PipelineParams(
        stages=jax.tree.map(split(_STACKED_DIMS), shardings.stages, shapes.stages),
        shared=jax.tree.map(split(0), shardings.shared, shapes.shared),
    )


def optimizer_shardings(state: Any, like_params: PipelineParams, mesh: Mesh) -> Any:
    """Return the shardings of an optax state: `like_params` for copies of the parameter tree, else replicated."""

    def is_copy(node: Any) -> bool:
        return isinstance(node, PipelineParams)

    return jax.tree.map(
        lambda node: like_params if is_copy(node) else NamedSharding(mesh, PartitionSpec()), state, is_leaf=is_copy
    )


def _is_decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) in _DECAYED, params)
