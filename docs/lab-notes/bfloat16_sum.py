"""A bfloat16 sum over the manual axis of a partly manual region aborts XLA:CPU."""

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((2, 2), ("pipe", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
total = jax.shard_map(
    lambda x: jax.lax.psum(x, "pipe"),
    mesh=mesh,
    in_specs=jax.P("pipe"),
    out_specs=jax.P(),
    axis_names={"pipe"},  # without this line all axes are manual, and it works
)
print(jax.jit(total)(jnp.ones((4, 4), jnp.bfloat16)))
