"""A sum over an axis of one device, in a fully manual region, stays in the program of XLA's CPU backend."""

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((1, 4), ("pipe", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
total = jax.shard_map(
    lambda x: jax.lax.psum(x, "pipe"), mesh=mesh, in_specs=jax.P("pipe", "data"), out_specs=jax.P(None, "data")
)
compiled = jax.jit(total).lower(jnp.ones((4, 4))).compile()
print(compiled.as_text().count(" all-reduce("), "all-reduce in the program")
