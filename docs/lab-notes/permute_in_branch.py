"""A permute in a branch that only some devices take hangs: it waits for all devices, not for those of its axis."""

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((2, 2), ("pipe", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def swap_on_rank_0(x):
    """Swap blocks over tensor, on the first pipe rank alone."""
    return jax.lax.cond(
        jax.lax.axis_index("pipe") == 0,
        lambda x: jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)]),  # psum, all_gather, all_to_all work here
        lambda x: x,
        x,
    )


spec = jax.P("pipe", "tensor")
swapped = jax.shard_map(swap_on_rank_0, mesh=mesh, in_specs=spec, out_specs=spec)
print(jax.jit(swapped)(jnp.arange(16.0).reshape(4, 4)))
