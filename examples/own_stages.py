"""Run a model of your own through the pipeline: three functions and their parameters, nothing of trellax.layers.

Run:     python examples/own_stages.py     (2 CPU cores, about 15 seconds)
Expect:  the loss falls, and loss and gradients equal those of one device.
"""

import jax
import jax.numpy as jnp
import optax
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads
from trellax.schedules import build_schedule

# --8<-- [start:mesh]
use_fake_devices(8)  # before the first array; leave it out where there are eight real devices
mesh = build_mesh(MeshSpec(data=2, pipe=4))
schedule = build_schedule("1f1b", num_ranks=4, num_microbatches=8)
# --8<-- [end:mesh]

# --8<-- [start:data]
x_MBD = jax.random.normal(jax.random.key(0), (8, 4, 64))  # [microbatches, sequences, width]
batch = {"x": x_MBD, "y": jnp.sin(3 * x_MBD)}
weights_LDD = 0.1 * jax.random.normal(jax.random.key(1), (12, 64, 64))  # 12 layers
# --8<-- [end:data]


# --8<-- [start:functions]
def first(shared, microbatch):
    """Return what enters the first layer: an embedding, or the input itself."""
    return microbatch["x"]


def layer(weight_DD, x_BD, microbatch):
    """Return the output of one layer. What it keeps for its backward is what `jax.vjp` keeps."""
    return x_BD + jnp.tanh(x_BD @ weight_DD)


def last(shared, x_BD, microbatch):
    """Return this microbatch's part of the loss; parts are added, so divide by the size of the whole batch."""
    return jnp.sum((x_BD - microbatch["y"]) ** 2) / batch["y"].size


fns = StageFns(first=first, layer=layer, last=last)
params = PipelineParams(stages=weights_LDD.reshape(1, 4, 3, 64, 64), shared={})  # [chunks, ranks, layers, ...]
# --8<-- [end:functions]


# --8<-- [start:step]
optimizer = optax.sgd(0.5)


@jax.jit
def step(params, state):
    """Return parameters and optimizer state after one update, and the loss before it."""
    out = pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=schedule)
    updates, state = optimizer.update(out.grads, state, params)
    return optax.apply_updates(params, updates), state, out.loss


state = optimizer.init(params)
for number in range(5):
    params, state, loss = step(params, state)
    print(f"step {number}: loss {loss:.4f}")
# --8<-- [end:step]


# --8<-- [start:law]
def loss_on_one_device(weights_LDD):
    """Return the same loss, written without a pipeline."""
    y_MBD = batch["x"]
    for weight_DD in weights_LDD:
        y_MBD = y_MBD + jnp.tanh(y_MBD @ weight_DD)
    return jnp.mean((y_MBD - batch["y"]) ** 2)


out = jax.jit(lambda p: pipeline_grads(fns, params=p, batch=batch, mesh=mesh, schedule=schedule))(params)
loss, grads_LDD = jax.value_and_grad(loss_on_one_device)(params.stages.reshape(12, 64, 64))
error = jnp.max(jnp.abs(out.grads.stages.reshape(12, 64, 64) - grads_LDD)) / jnp.max(jnp.abs(grads_LDD))
print(f"loss {out.loss:.6f} and {loss:.6f} on one device; gradients differ by {error:.0e} of the largest")
# --8<-- [end:law]
