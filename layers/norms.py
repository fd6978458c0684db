"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), most from Flax, with annotated dimensions."""

import jax
from flax import nnx

from ..meshes import DEFAULT_RULES, ShardingRules
from .config import ModelConfig
from .options.shifted_norm import ShiftedNorm
from .own.make import make_own
from .own.mistakes import code_of
from .partitioning import param_metadata

Norm = nnx.LayerNorm | nnx.RMSNorm | ShiftedNorm | nnx.Module


def make_norm(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Norm:
    """Return the norm that the config names, with statistics in float32; `normalize` applies it.

    Scale and bias are replicated over `tensor`: the features they act on are not split.
    """
    if config.norm_class:
        return make_own(config, "norm_class", rngs=rngs, rules=rules)
    if config.norm == "rmsnorm1p":
        return ShiftedNorm(config, size=config.hidden_size, rules=rules)
    shared = {"epsilon": config.norm_epsilon, "dtype": config.dtype, "rngs": rngs}
    named = param_metadata(("embed",), rules)
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.hidden_size, scale_metadata=named, **shared)
    return nnx.LayerNorm(
        config.hidden_size,
        use_bias=config.other_bias == "on",
        # Flax's fast variance, E[x^2] - E[x]^2, loses every digit where the mean is 1,000 times the deviation.
        use_fast_variance=False,
        scale_metadata=named,
        bias_metadata=named,
        **shared,
    )


def make_head_norm(config: ModelConfig, *, rngs: nnx.Rngs, rules: ShardingRules = DEFAULT_RULES) -> Norm:
    """Return the RMSNorm over the features of each query or key head; its scale is replicated over `tensor`."""
    if config.norm == "rmsnorm1p":
        return ShiftedNorm(config, size=config.head_size, dim="head", rules=rules)
    return nnx.RMSNorm(
        config.head_size,
        epsilon=config.norm_epsilon,
        dtype=config.dtype,
        scale_metadata=param_metadata(("head",), rules),
        rngs=rngs,
    )


def normalize(norm: Norm | None, x_BTD: jax.Array) -> jax.Array:
    """Return the normalized x, keeping only x for the backward: x[B@data, T, D] -> y[B@data, T, D]; x without a norm.

    Heads x[B@data, T, N@tensor, H] are normalized alike. Plain autodiff would keep four more arrays of that size to
    save a few operations on each number.
    """
    if norm is None:
        return x_BTD
    graph, state = nnx.split(norm)

    def apply(state: nnx.State, x_BTD: jax.Array) -> jax.Array:
        return apply_norm(nnx.merge(graph, state), x_BTD)

    return jax.checkpoint(apply, prevent_cse=False)(state, x_BTD)


def apply_norm(norm: Norm | None, x_BTD: jax.Array) -> jax.Array:
    """Return the normalized x, also under strict dtype promotion: Flax multiplies float32 statistics with x."""
    if norm is None:
        return x_BTD
    with jax.numpy_dtype_promotion("standard"), code_of(norm):
        return norm(x_BTD)
