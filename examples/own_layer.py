"""Write a tensor-parallel layer by hand: what each device holds, what it sends, and that it equals one device.

Run:     python examples/own_layer.py     (2 CPU cores, about 15 seconds)
Expect:  one loss in a pipeline, under plain jax.jit and without a mesh; 32 all-reduces over tensor.
"""

import jax
import jax.numpy as jnp
from trellax.layers.collectives import enter_split, sum_blocks
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, stages_from_layers
from trellax.programs import inspect_compiled
from trellax.schedules import build_schedule

use_fake_devices(8)
mesh = build_mesh(MeshSpec(data=2, tensor=2, pipe=2))
keys = jax.random.split(jax.random.key(0), 4)
layers = {  # 8 layers of width D=16 with F=32 features inside
    "scale": jnp.ones((8, 16)),
    "up": 0.3 * jax.random.normal(keys[0], (8, 16, 32)),
    "down": 0.3 * jax.random.normal(keys[1], (8, 32, 16)),
}
batch = {"x": jax.random.normal(keys[2], (4, 6, 16)), "y": jax.random.normal(keys[3], (4, 6, 16))}


# --8<-- [start:layer]
def layer(params, x, microbatch):
    """Return {"h", "start"}, each [b, D]: normalize, multiply by up[D, F@tensor] and by down[F@tensor, D], and add."""
    n_bD = x["h"] * jax.lax.rsqrt(jnp.mean(x["h"] ** 2, axis=-1, keepdims=True)) * params["scale"]
    n_bD, up_Df = enter_split(n_bD, params["up"], ["tensor"])
    h_bf = jnp.tanh(n_bD @ up_Df)  # this device's own features
    y_bD = sum_blocks(h_bf @ params["down"], ["tensor"])
    return {"h": x["h"] + y_bD + 0.1 * x["start"], "start": x["start"]}


# --8<-- [end:layer]
# --8<-- [start:fns]
def first(shared, microbatch):
    """Return what travels from layer to layer: the hidden state, and the input that each layer sees again."""
    return {"h": microbatch["x"], "start": microbatch["x"]}


def last(shared, x, microbatch):
    """Return this microbatch's part of the mean squared error."""
    return jnp.sum((x["h"] - microbatch["y"]) ** 2) / batch["y"].size


specs = {"scale": jax.P(), "up": jax.P(None, "tensor"), "down": jax.P("tensor", None)}  # of one layer
fns = StageFns(first=first, layer=layer, last=last, stage_specs=specs)
# --8<-- [end:fns]


# --8<-- [start:law]
def loss_of(layers, batch):
    """Return the loss of all layers in turn: the same functions, without a pipeline."""
    x, _ = jax.lax.scan(lambda x, own: (layer(own, x, batch), None), first({}, batch), layers)
    return last({}, x, batch)


params = PipelineParams(stages=stages_from_layers(layers, num_ranks=2), shared={})
schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=4)
step = jax.jit(lambda p, b: pipeline_grads(fns, params=p, batch=b, mesh=mesh, schedule=schedule))
out = step(params, batch)
loss, grads = jax.value_and_grad(loss_of)(layers, batch)  # no mesh: the verbs do nothing
shardings = {name: jax.NamedSharding(mesh, jax.P(None, *spec)) for name, spec in specs.items()}
with jax.set_mesh(mesh):  # the compiler adds the sums
    jit_loss = jax.jit(loss_of)(jax.device_put(layers, shardings), batch)
print(f"loss {out.loss:.5f} in a pipeline, {jit_loss:.5f} under jit, {loss:.5f} without a mesh")
pairs = zip(jax.tree.leaves(natural_order(out.grads.stages)), jax.tree.leaves(grads), strict=True)
worst = max(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs)) for ours, theirs in pairs)
print(f"gradients differ by {'less' if worst < 2e-6 else 'more'} than 2e-06 of the largest")
# --8<-- [end:law]

# --8<-- [start:sends]
report = inspect_compiled(step.lower(params, batch).compile(), mesh, parameters=params)
sums = [one for one in report.collectives if one.axis == "tensor"]
print(sum(one.count[0] for one in sums), "all-reduces over tensor of", {one.operand_bytes for one in sums}, "bytes")
# --8<-- [end:sends]
