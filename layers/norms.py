"""LayerNorm and RMSNorm from Flax, with the dimension names every parameter must carry."""

from flax import nnx

from .config import ModelConfig


def make_norm(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    """Return the norm the config names; x[B@data, T, D] -> y[B@data, T, D], statistics in float32.

    Scale and bias are whole on every tensor rank: the features they act on are not split there.
    """
    shared = {"epsilon": config.norm_epsilon, "dtype": config.dtype, "rngs": rngs}
    named = {"dims": ("embed",)}
    if config.norm == "rmsnorm":
        return nnx.RMSNorm(config.hidden_size, scale_metadata=named, **shared)
    return nnx.LayerNorm(
        config.hidden_size, use_bias=config.bias == "on", scale_metadata=named, bias_metadata=named, **shared
    )
