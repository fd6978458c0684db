"""A sum over a manual axis of size 1 does not compile in a partly manual region."""

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 4)
mesh = jax.make_mesh((1, 4), ("pipe", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
total = jax.shard_map(
    lambda x: jax.lax.psum(x, "pipe"), mesh=mesh, in_specs=jax.P("pipe"), out_specs=jax.P(), axis_names={"pipe"}
)
x = jax.device_put(jnp.ones((4, 4)), jax.NamedSharding(mesh, jax.P(None, "data")))
print(jax.jit(total)(x))
