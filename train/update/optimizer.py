"""Build AdamW or Muon with a schedule of the learning rate and clipping by the global norm, and shard its state.

The state may hold an average of the weights too: `average_weights`.

AdamW is algorithm 2 of Loshchilov and Hutter 2019; the cosine decay follows Loshchilov and Hutter 2017 ("SGDR"),
equation 5, without restarts; warmup-stable-decay is of Hu et al. 2024 ("MiniCPM"), section 4; clipping is algorithm 1
of Pascanu et al. 2013. Read `../step.py` for the use.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...configs.rate_schedules import OWN_SCHEDULES, make_optax_schedule
from ...configs.run_config import OptimizerSection
from ...layers.lora.check_config import ADAPTERS
from ...meshes import ConfigError
from ...meshes.arguments import check_count, check_number
from ...meshes.errors import shown
from ...pipeline import PipelineParams
from .muon import make_muon

_MOST_LOOKED_AT = 1000
"""Steps whose learning rate is computed before a run."""

_STACK_DIMS = 3
"""Leading dims of a layer's parameter: [chunks, ranks, layers, ...]."""

_DECAYED = ("kernel", "table", "positions", "weight", *ADAPTERS)
"""Names of matrices, adapters and weights of routers too, which have weight decay; norm scales and biases have none."""


def make_learning_rate(section: OptimizerSection, *, steps: int, peak: Any = None) -> Callable[[Any], Any]:
    """Return a function step -> learning rate: linear warm-up, then what `lr_schedule` says.

    With `f` for `min_lr_ratio`, as shares of the peak after the warm-up:

        cosine    1 to f in half a cosine
        linear    1 to f in a line
        constant  1
        wsd       1, then in the last `decay_steps` 1 to f in a line
        a call    what that schedule of optax returns, counted from the end of the warm-up

    Args:
        peak: the peak learning rate float32[], if it is an input of the program; the section's if left out.

    Raises:
        ConfigError: there are no steps.
    """
    check_count("steps", steps, error=ConfigError)
    peak = section.learning_rate if peak is None else peak
    fraction = _make_fraction(section, steps=steps)
    return lambda step: peak * fraction(step)


def check_rates(section: OptimizerSection, *, steps: int) -> None:
    """Raise unless the learning rate is a number of 0 or more in every step that is looked at, and not always 0.

    At most `_MOST_LOOKED_AT` steps are, first and last among them. Of our own schedules none is.

    Raises:
        ConfigError: it is not.
    """
    if section.lr_schedule in OWN_SCHEDULES:
        return
    looked_at = np.unique(np.linspace(0, steps, _MOST_LOOKED_AT).astype(np.int32))
    asked = f"optimizer.lr_schedule={shown(section.lr_schedule)}"
    fix = "give values that are shares of optimizer.learning_rate, 0 or more."
    try:
        rates = _rates_on_host(section, looked_at, steps=steps)
    # optax looks at some values only where it computes with them.
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"{asked}: optax cannot compute it: {error}", fix=fix) from None
    wrong = looked_at[~(np.isfinite(rates) & (rates >= 0))]
    if wrong.size:
        value = rates[looked_at == wrong[0]][0]
        raise ConfigError(f"{asked}: the rate is {value:.3g} in step {wrong[0]} of train.steps={steps}.", fix=fix)
    if not rates[looked_at >= min(section.warmup_steps, steps)].any():
        raise ConfigError(f"{asked}: the rate is 0 in all steps to train.steps={steps}.", fix=fix)


def _rates_on_host(section: OptimizerSection, looked_at: np.ndarray, *, steps: int) -> np.ndarray:
    """Return the learning rates of steps [n], float32, computed on the host whatever the run is on."""
    host = jax.local_devices(backend="cpu")[0]
    with jax.default_device(host), jax.numpy_dtype_promotion("standard"), jax.transfer_guard("allow"):
        rates = jax.vmap(make_learning_rate(section, steps=steps))(jnp.asarray(looked_at))
        return np.broadcast_to(np.asarray(rates, np.float32), looked_at.shape)


def _make_fraction(section: OptimizerSection, *, steps: int) -> Callable[[Any], Any]:
    """Return a function step -> learning rate / its peak."""
    warmup, floor = section.warmup_steps, section.min_lr_ratio
    # Not from 0, with which the first step would change nothing.
    first = 1 / (warmup + 1)
    end = max(steps, warmup + 1)
    if section.lr_schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(first, 1.0, warmup, end, floor)
    parts, starts = [optax.linear_schedule(first, 1.0, warmup)] if warmup else [], [warmup] if warmup else []
    if section.lr_schedule not in OWN_SCHEDULES:
        own = make_optax_schedule(section.lr_schedule)
        return optax.join_schedules([*parts, own], starts) if parts else own
    if section.lr_schedule == "linear":
        parts.append(optax.linear_schedule(1.0, floor, end - warmup))
    else:
        parts.append(optax.constant_schedule(1.0))
    if section.lr_schedule == "wsd":
        decay = min(section.decay_steps or max(1, steps // 10), end - warmup)
        parts.append(optax.linear_schedule(1.0, floor, decay))
        starts.append(end - decay)
    return optax.join_schedules(parts, starts)


def make_optimizer(
    section: OptimizerSection,
    *,
    steps: int,
    peak: Any = None,
    norm: jax.Array | None = None,
    ema: float = 0.0,
    shardings: PipelineParams | None = None,
) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW with weight decay on matrices; `peak` as in `make_learning_rate`.

    With `kind="muon"` the kernels of layers are updated by Muon (`muon.py`). Each layer's kernel is one matrix, however
    it is split.

    Args:
        norm: the global norm float32[], to update some of the parameters alone; that of what is given if left out.
        ema: decay of an average of the weights, below 1, which the state then has too; 0 for none.
        shardings: those of the gradients, for Muon; left out, kernels are whole, as they are where a state is made.

    Raises:
        ConfigError: there are no steps, or the decay is not a number of 0 or more.
    """
    check_number("ema", ema, error=ConfigError)
    rate = make_learning_rate(section, steps=steps, peak=peak)
    adamw = optax.adamw(
        rate,
        b1=section.beta1,
        b2=section.beta2,
        eps=section.epsilon,
        weight_decay=section.weight_decay,
        mask=_is_decayed,
    )
    update: Any = adamw
    if section.kind == "muon":
        muon = make_muon(rate, weight_decay=section.weight_decay, shardings=shardings)
        update = optax.partition({"muon": muon, "adamw": adamw}, _find_optimizers)
    clip = optax.clip_by_global_norm(section.clip_norm) if norm is None else _clip_by(norm, limit=section.clip_norm)
    return optax.chain(clip, update, average_weights(ema)) if ema else optax.chain(clip, update)


class AverageState(NamedTuple):
    """The state of `average_weights`: an average of each parameter, float32. A save names its arrays by this field."""

    average: PipelineParams


def average_weights(decay: float) -> optax.GradientTransformation:
    """Return a last transformation, which leaves updates as they are and averages the weights that they lead to.

    The average starts as the first weights, and after each step is decay * average + (1 - decay) * weights (EMA; Polyak
    and Juditsky 1992, Izmailov et al. 2018): it remembers about 1 / (1 - decay) steps.
    """

    def init(params: Any) -> AverageState:
        return AverageState(average=jax.tree.map(jnp.array, params))

    def update(updates: Any, state: AverageState, params: Any = None) -> tuple[Any, AverageState]:
        def one(average: jax.Array, param: jax.Array, change: jax.Array) -> jax.Array:
            return decay * average + (1 - decay) * (param + change)

        return updates, AverageState(average=jax.tree.map(one, state.average, params, updates))

    return optax.GradientTransformation(cast("Any", init), cast("Any", update))


def _clip_by(norm: jax.Array, *, limit: float) -> optax.GradientTransformation:
    """Return `optax.clip_by_global_norm` for a norm that is known."""

    def clip(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        clipped = jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm.astype(g.dtype) * limit), updates)
        return clipped, state

    return optax.GradientTransformation(optax.clip_by_global_norm(limit).init, clip)


def optimizer_shardings(state: Any, like_params: PipelineParams, mesh: Mesh) -> Any:
    """Return the shardings of an optax state: those of `like_params` for copies of the parameter tree, else replicated.

    A copy may lack parameters that another optimizer updates.
    """
    known = dict(jax.tree_util.tree_leaves_with_path(like_params))

    def place(node: Any) -> Any:
        if isinstance(node, PipelineParams):
            return jax.tree_util.tree_map_with_path(lambda path, _: known[path], node)
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(place, state, is_leaf=lambda node: isinstance(node, PipelineParams))


def _find_optimizers(params: PipelineParams) -> Any:
    """Return the optimizer of each parameter: Muon for kernels of layers, [chunks, ranks, layers, ..., D, F]."""

    def choose(path: Any, leaf: Any) -> str:
        # A user's class may name a vector so.
        return "muon" if getattr(path[-1], "key", None) == "kernel" and leaf.ndim >= _STACK_DIMS + 2 else "adamw"

    return jax.tree_util.tree_map_with_path(choose, params)


def _is_decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", None) in _DECAYED, params)
