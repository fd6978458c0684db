"""`jax.lax.ragged_all_to_all` is not implemented on XLA:CPU."""

import jax
import jax.numpy as jnp

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))


def exchange(x):
    """Send one row to each device."""
    ones, offsets = jnp.array([1, 1], jnp.int32), jnp.array([0, 1], jnp.int32)
    places = jnp.full(2, jax.lax.axis_index("expert"), jnp.int32)
    return jax.lax.ragged_all_to_all(x, jnp.zeros_like(x), offsets, ones, places, ones, axis_name="expert")


run = jax.shard_map(exchange, mesh=mesh, in_specs=jax.P("expert"), out_specs=jax.P("expert"))
print(jax.jit(run)(jnp.arange(4.0)))
