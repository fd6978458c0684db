"""Make the jitted training step and the jitted validation, functions of a state and a batch.

Read `../pipeline/` for the loss and its gradients, `update/` for the update, `step_health.py` for bad steps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import optax

from ..layers.experts.balance import move_biases
from ..layers.experts.kinds import layer_kinds
from ..meshes.device_kind import GPUS, platform_of
from ..meshes.switches import xla_flags
from ..pipeline import LossAndGrads, PipelineParams, compiler_options, pipeline_grads, pipeline_loss
from ..pipeline.model.losses import REWARDS, Z_LOSS
from ..pipeline.model.own_block import LAYER_LOSS
from ..plan.costs.device_params import block_matrices
from .metrics.noise_scale import measure_noise
from .state import Setup, TrainState
from .step_health import is_good_step, next_health
from .update.offload import apply_update, update_by_parts
from .update.optimizer import make_learning_rate, make_optimizer

Batch = dict[str, jax.Array]
"""`tokens` and `targets` int32[M, B@data, T@context], `weights` float32 alike that sum to 1.

With `data.packing` also `segments` and `positions` int32, as in `data/documents.py`."""

_JOINED_UP_TO = "xla_gpu_all_gather_combine_threshold_bytes"
_LAUNCHED_TOGETHER = "xla_gpu_enable_command_buffer"
_WRITTEN_IN_PLACE = "xla_gpu_enable_dynamic_slice_fusion"
_STARTED_EARLY = "xla_gpu_experimental_collective_start_as_early_as_possible"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Replicated scalars of one step; float32[] but for `taken`, bool[].

    `loss` is that of the text, without what routers, blocks and the z-loss add. `grad_norm` is the global norm before
    clipping. `taken` is false where the loss or the gradient was bad and the update was left out. `mean_loss` is the
    running mean of the good losses before this step, with which its loss was compared to find a spike; infinite before
    the first. `router` has, of a mixture of experts, `router_loss`, `expert_peak`, the most loaded expert of any layer
    over the mean, and `dropped`, the share of pairs of tokens and experts that were left out. `block` has the metrics
    of a block of the user's, with what it adds to the loss as `layer_loss`. `preferences` has, of pairs of answers, the
    means of `reward_margin` and `reward_accuracy` (`layers/preference/dpo.py`). `noise` has, with `train.noise_scale`,
    `signal` and `spread` (`metrics/noise_scale.py`). `z_loss` is what `train.z_loss` adds to the loss, None without it.
    """

    loss: jax.Array
    grad_norm: jax.Array
    lr: jax.Array
    taken: jax.Array
    mean_loss: jax.Array
    router: dict[str, jax.Array] = field(default_factory=dict)
    noise: dict[str, jax.Array] = field(default_factory=dict)
    preferences: dict[str, jax.Array] = field(default_factory=dict)
    block: dict[str, jax.Array] = field(default_factory=dict)
    z_loss: jax.Array | None = None


def make_train_step(setup: Setup) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return a jitted step: (state, batch, peak_rate) -> (state, metrics); it donates the state that it is given.

    state, {tokens, targets, weights}[M, B@data, T], peak_rate[] -> state, metrics[]

    `peak_rate` is the peak learning rate, `setup.peak_rate`. It is an input so that runs with different rates share
    one compiled program; left out, the rate of the config is compiled in as a constant.
    Gradients come from `pipeline_grads`. With ZeRO-1 each data rank updates its own part of the parameters, which are
    then all-gathered over `data`. A bad step (`step_health.py`) leaves parameters and optimizer unchanged.
    """
    section = setup.config.train

    def step(state: TrainState, batch: Batch, peak_rate: jax.Array | None = None) -> tuple[TrainState, StepMetrics]:
        given: dict[str, Any] = {"params": state.params, "batch": batch, "mesh": setup.mesh}
        given |= {"schedule": setup.schedule, "key": _key_of(setup, state.step)}
        waits = "residuals" if section.offload == "residuals" else "none"
        given |= {"overlap": setup.config.pipeline.overlap, "offload": waits, "shard_squares": section.noise_scale}
        out = pipeline_grads(setup.model.fns, **given)
        grads = jax.lax.with_sharding_constraint(out.grads, setup.moment_shardings)
        grad_norm = optax.tree.norm(grads)
        good = is_good_step(state.health, loss=out.loss, grad_norm=grad_norm, section=section)
        # Biases move first, so that an average of the weights sees them where they are after this step.
        moved = replace(state, params=_move_biases(setup, state.params, out.stats, good=good))
        params, opt_state, lr = _update(setup, moved, grads, grad_norm=grad_norm, good=good, peak_rate=peak_rate)
        moves_on = 1 if section.bad_step == "skip" else good.astype(jnp.int32)
        mean_loss = state.health.mean_loss
        health = next_health(state.health, good=good, loss=out.loss, section=section)
        state = TrainState(step=state.step + moves_on, params=params, opt_state=opt_state, health=health)
        measured = _layer_metrics(setup, out) | {"noise": _noise_metrics(setup, out, batch, grad_norm=grad_norm)}
        metrics = StepMetrics(grad_norm=grad_norm, lr=lr, taken=good, mean_loss=mean_loss, **measured)
        return state, metrics

    # Without out_shardings XLA may choose other shardings for the new state, and the next step would compile again.
    return jax.jit(step, donate_argnums=0, out_shardings=(setup.shardings, None))


def _update(
    setup: Setup,
    state: TrainState,
    grads: PipelineParams,
    *,
    grad_norm: jax.Array,
    good: jax.Array,
    peak_rate: jax.Array | None,
) -> tuple[PipelineParams, Any, jax.Array]:
    """Return updated parameters and optimizer state, and the learning rate of this step."""
    section, rates = setup.config.train, {"steps": setup.config.train.steps, "peak": peak_rate}
    # optax mixes integer counts with floats, which jax_numpy_dtype_promotion="strict" would refuse.
    with jax.numpy_dtype_promotion("standard"):
        lr = jnp.asarray(make_learning_rate(setup.config.optimizer, **rates)(state.step - state.health.skipped))
        # Parts are clipped by the norm of all gradients.
        norm, update = (grad_norm, update_by_parts) if setup.is_offloaded else (None, apply_update)
        given: dict[str, Any] = {"norm": norm, "ema": section.ema, "shardings": setup.moment_shardings}
        optimizer = make_optimizer(setup.config.optimizer, **rates, **given)
        held = {"opt_state": state.opt_state, "params": state.params}
        return *update(optimizer, grads=grads, **held, good=good), lr


def _key_of(setup: Setup, step: jax.Array) -> jax.Array | None:
    """Return the random key of a step, by the seed of the run and its number; None for a model that draws nothing."""
    model = setup.config.model
    if not (model.block or model.dropout or model.stochastic_depth):
        return None
    return jax.random.fold_in(jax.random.key(setup.config.run.seed), step)


def _move_biases(setup: Setup, params: PipelineParams, stats: Any, *, good: jax.Array) -> PipelineParams:
    """Return the parameters with the biases of routers moved, if routers have some that are not frozen."""
    model = setup.config.model
    if not model.moves_router_bias:
        return params
    # Tokens of each layer lie as its bias does, [chunks, ranks@pipe, layers, E].
    (tokens,) = jax.tree.leaves(stats)
    stages = move_biases(params.stages, tokens, rate=model.router_bias_rate, is_good=good)
    return replace(params, stages=stages)


def _layer_metrics(setup: Setup, out: LossAndGrads) -> dict[str, Any]:
    """Return the loss of the model without those of its layers, and what layers of experts or of the user report."""
    router = _router_metrics(out.metrics)
    of_head = {name: out.metrics[name] for name in (*REWARDS, Z_LOSS) if name in out.metrics}
    block = {name: value for name, value in out.metrics.items() if name not in of_head}
    block = block if setup.config.model.block else {}
    z_loss, loss = of_head.pop(Z_LOSS, None), out.loss
    for added in (router.get("router_loss"), block.get(LAYER_LOSS), z_loss):
        loss = loss if added is None else loss - added
    return {"loss": loss, "router": router, "block": block, "preferences": of_head, "z_loss": z_loss}


def _router_metrics(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Return what `StepMetrics.router` has, from the sums of the layers: expert_tokens [L, E]; {} without experts."""
    if "expert_tokens" not in sums:
        return {}
    tokens = sums["expert_tokens"]
    peak = (tokens.max(-1) / tokens.mean(-1)).max()
    return {
        "router_loss": sums["router_loss"],
        "expert_peak": peak,
        "dropped": sums["dropped_pairs"] / tokens.sum(),
    }


def _noise_metrics(setup: Setup, out: LossAndGrads, batch: Batch, *, grad_norm: jax.Array) -> dict[str, jax.Array]:
    """Return what `StepMetrics.noise` has."""
    if out.shard_squares is None:
        return {}
    return measure_noise(grad_norm, out.shard_squares, batch["weights"], num_shards=setup.sizes.data)


def step_options(setup: Setup, *, is_traced: bool = False) -> dict[str, Any]:
    """Return the compiler options that a training step has beside those of `xla.py`, on GPUs.

    They are those of `pipeline_grads`, what loops over layers need in one version of XLA, and, where layers or chunks
    gather their weights, the bytes up to which XLA joins gathers; where layers do, also that a gather starts before the
    first product of the layer before. By itself XLA starts it before the last one, which is too late between nodes.

    Args:
        is_traced: whether a profiler is to find the instructions: without command buffers (CUDA graphs) then, whose
            kernels have no names.
    """
    options, shard = _overlap_options(setup) | _loop_options(setup), setup.config.train.shard
    if platform_of(setup.mesh) not in GPUS:
        return options
    if is_traced:
        options |= {_LAUNCHED_TOGETHER: ""}
    if shard not in ("chunk", "layer"):
        return options
    if shard == "layer" and _STARTED_EARLY not in xla_flags():
        options |= {_STARTED_EARLY: True}
    if _JOINED_UP_TO not in xla_flags():
        # No more than that: gathers of tokens over tensor, which are needed at other times, are not to be joined.
        model, sizes = setup.config.model, setup.sizes
        parts = {"tensor": sizes.tensor, "expert": sizes.expert}
        matrices = max(block_matrices(kind.config, **parts) for kind in layer_kinds(model))
        by_kind = setup.model.fns.by_kind(setup.model.params.stages)
        # Stages are [C, ranks, k, ...]: a chunk has room for k layers of each kind.
        num_layers = sum(jax.tree.leaves(own)[0].shape[2] for own in by_kind.values()) if shard == "chunk" else 1
        options |= {_JOINED_UP_TO: jnp.dtype(model.dtype).itemsize * matrices * num_layers}
    return options


def _overlap_options(setup: Setup) -> dict[str, Any]:
    options = compiler_options(setup.mesh, overlap=setup.config.pipeline.overlap, axes=setup.sizes.roles)
    # Weights that were gathered once a step lie elsewhere, and an early start exposes more of what goes over tensor:
    # benchmarks/RESULTS.md, "What stands beside the messages".
    return {name: on for name, on in options.items() if setup.config.train.shard != "step" or name != _STARTED_EARLY}


def _loop_options(setup: Setup) -> dict[str, Any]:
    """Return {}, or on jaxlib 0.11 in a loop over layers that products do not write into slices of arrays themselves.

    There XLA computes a product twice if a slice of what is kept for the backward is not its only use: once into the
    slice, once for the rest of the layer (openxla/xla 45799). A fifth of the flops of a step are then for nothing.
    """
    doubles = jaxlib.__version__.startswith("0.11.") and setup.config.pipeline.unroll == "off"
    if not doubles or platform_of(setup.mesh) not in GPUS or _WRITTEN_IN_PLACE in xla_flags():
        return {}
    return {_WRITTEN_IN_PLACE: False}


def make_eval_step(setup: Setup) -> Callable[[TrainState, Batch], jax.Array]:
    """Return a jitted validation: (state, batch) -> loss float32[] of the text alone, forwards only."""

    def loss(state: TrainState, batch: Batch) -> jax.Array:
        return pipeline_loss(
            setup.model_without_added_losses.fns,
            params=state.params,
            batch=batch,
            mesh=setup.mesh,
            schedule=setup.schedule,
        )

    return jax.jit(loss)
