"""Train dense and expert layers in turn: a balance loss, metrics, and a bias of the router outside of the gradients.

Run:     python examples/router.py     (2 CPU cores, about 20 seconds)
Expect:  the busiest expert's load comes down, and both meshes print the same.
"""

import jax
import jax.numpy as jnp
from trellax.meshes import MeshSpec, build_mesh, use_fake_devices
from trellax.pipeline import Output, PipelineParams, StageFns, pipeline_grads, stages_from_layers
from trellax.schedules import build_schedule

use_fake_devices(8)
PATTERN = ("dense", "experts")  # of 4 layers: dense, experts, dense, experts
SHAPES = (2, 16, 16), (2, 16, 4), (2, 4, 16, 8), (2, 4, 8, 16)  # [layers of the kind, ...]; E=4 experts, D=16, F=8
w, router, up, down = (0.3 * jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(SHAPES))
layers = {"dense": {"w": w}, "experts": {"router": router, "up": up, "down": down}}
x = 0.5 + jax.random.normal(jax.random.key(4), (4, 8, 12, 16))  # [microbatches, sequences, tokens, width]
batch = {"x": x, "y": jnp.sin(x)}


# --8<-- [start:layers]
def dense(params, x_bTD, microbatch):
    """Return x + tanh(x @ w): the simple form of a layer."""
    return x_bTD + jnp.tanh(x_bTD @ params["w"])


def experts(params, x_bTD, microbatch, info):
    """Return x plus the work of each token's two experts, and how evenly the tokens were shared."""
    score_bTE = jax.nn.sigmoid(x_bTD @ params["router"])
    _, chosen_bTk = jax.lax.top_k(score_bTE + info.state, 2)  # the bias has a say in the choice alone
    chosen_bTE = jax.nn.one_hot(chosen_bTk, 4).sum(-2)
    gate_bTE = score_bTE * chosen_bTE / (score_bTE * chosen_bTE).sum(-1, keepdims=True)
    h_bTEF = jnp.tanh(jnp.einsum("btd,edf->btef", x_bTD, params["up"]))
    y_bTD = jnp.einsum("btef,efd,bte->btd", h_bTEF, params["down"], gate_bTE)
    used_bE = chosen_bTE.mean(1) * 4 / 2  # 1 where each expert has as many tokens of the sequence
    share_bE = (score_bTE / score_bTE.sum(-1, keepdims=True)).mean(1)
    balance = (used_bE * share_bE).sum() / (4 * 8)  # a mean over the sequences of the whole batch
    return Output(
        x=x_bTD + y_bTD,
        loss=0.01 * balance,  # with gradients
        metrics={"balance": balance / 2},  # a mean over the two layers of experts
        stats=chosen_bTE.sum((0, 1)),  # tokens of each expert [E], for each layer by itself
    )


fns = StageFns(
    first=lambda shared, microbatch: microbatch["x"],
    layer={"dense": dense, "experts": experts},
    last=lambda shared, x, microbatch: jnp.sum((x - microbatch["y"]) ** 2) / batch["y"].size,
    pattern=PATTERN,
    num_layers=4,
)


# --8<-- [end:layers]
# --8<-- [start:train]
def train(spec):
    mesh = build_mesh(spec, devices=jax.devices()[: spec.num_devices])
    params = PipelineParams(stages=stages_from_layers(layers, num_ranks=spec.pipe, pattern=PATTERN), shared={})
    state = {"dense": None, "experts": jnp.zeros((1, spec.pipe, 2 // spec.pipe, 4))}  # [chunks, ranks, layers, E]
    schedule = build_schedule("1f1b", num_ranks=spec.pipe, num_microbatches=4)

    @jax.jit
    def step(params, state):
        out = pipeline_grads(fns, params=params, batch=batch, mesh=mesh, schedule=schedule, state=state)
        load = out.stats["experts"]
        bias = state["experts"] + 0.01 * jnp.sign(load.mean(-1, keepdims=True) - load)
        return jax.tree.map(lambda w, dw: w - 0.2 * dw, params, out.grads), {"dense": None, "experts": bias}, out

    for number in range(21):
        params, state, out = step(params, state)
        if number % 10 == 0:
            most = out.stats["experts"].max() / out.stats["experts"].mean()
            print(f"{number}: loss {out.loss:.4f}, balance {out.metrics['balance']:.3f}, busiest {most:.2f}")


train(MeshSpec(data=4, pipe=2))
train(MeshSpec())
# --8<-- [end:train]
