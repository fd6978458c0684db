"""Train with dropout whose masks do not depend on mesh, schedule or number of microbatches.

Run:     python examples/dropout.py     (2 CPU cores, about 20 seconds)
Expect:  two very different meshes print the same losses.
"""

import jax
import jax.numpy as jnp
from trellax.layers.dropout import dropout
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads, pipeline_loss
from trellax.schedules import build_schedule

use_fake_devices(8)
x_ND = jax.random.normal(jax.random.key(0), (48, 16))  # all sequences of the batch
weights_LDD = 0.2 * jax.random.normal(jax.random.key(1), (4, 16, 16))  # 4 layers


# --8<-- [start:layer]
def make_layer(rate):
    def layer(weight_DD, x_bD, microbatch, info):
        """Return x + dropout(tanh(x @ w)); info.keys() has a key for each sequence of the microbatch."""
        return x_bD + dropout(jnp.tanh(x_bD @ weight_DD), rate=rate, keys=info.keys())

    return layer


def make_fns(rate):
    """Return the model with this rate of dropout: 0 for evaluation."""
    return StageFns(
        first=lambda shared, microbatch: microbatch,
        layer=make_layer(rate),
        last=lambda shared, x_bD, microbatch: jnp.sum((x_bD - jnp.sin(microbatch)) ** 2) / x_ND.size,
    )


# --8<-- [end:layer]
# --8<-- [start:train]
def train(spec, schedule_name, num_microbatches):
    mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    ranks = mesh.shape["pipe"]
    schedule = build_schedule(schedule_name, num_ranks=ranks, num_microbatches=num_microbatches)
    params = PipelineParams(stages=weights_LDD.reshape(1, ranks, 4 // ranks, 16, 16), shared={})
    given = {"batch": x_ND.reshape(num_microbatches, -1, 16), "mesh": mesh, "schedule": schedule}

    @jax.jit
    def step(params, number):
        key = jax.random.fold_in(jax.random.key(42), number)  # another one each step
        out = pipeline_grads(make_fns(0.2), params=params, key=key, **given)
        return jax.tree.map(lambda w, grad: w - 0.5 * grad, params, out.grads), out.loss

    for number in range(3):
        params, loss = step(params, jnp.int32(number))
        print(f"step {number}: loss {loss:.5f}")
    loss = jax.jit(lambda p: pipeline_loss(make_fns(0.0), params=p, key=jax.random.key(0), **given))(params)
    print(f"without dropout: loss {loss:.5f}")


train(MeshSpec(data=2, pipe=4), "1f1b", num_microbatches=8)
train(MeshSpec(data=4, pipe=2), "zb-h1", num_microbatches=3)
# --8<-- [end:train]
