"""The squared norms of the shards' own gradients are those of one device that is given each shard's sequences alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from trellax.layers import ModelConfig, Transformer, cross_entropy
from trellax.meshes import ScheduleError
from trellax.pipeline import PipelineParams, StageFns, pipeline_grads
from trellax.schedules import build_schedule
from trellax.train.metrics.noise_scale import NoiseScale, measure_noise

from .law import global_norm, masked_batch, mesh_of, natural_params, pipeline_step, small_model

LLAMA, GPT = small_model(style="llama", attention="gqa", embeddings="untied"), small_model(style="gpt")
CASES: dict[str, tuple[ModelConfig, str, dict[str, Any]]] = {
    "data": (LLAMA, "4x1x1", {}),
    "all axes, tokens split": (LLAMA, "2x2x2", {"vocab": "split", "sequence": "on"}),
    "all axes, tied, biases": (GPT, "2x2x2", {"vocab": "split", "sequence": "on"}),
    "tokens whole": (GPT, "2x2x2", {"vocab": "split"}),
    "gathered once a step": (GPT, "4x2x1", {"shard": "step", "sequence": "on"}),
    "gathered once a step, pipe": (LLAMA, "2x1x4", {"shard": "step", "vocab": "split"}),
    "names of one's own": (GPT, "dp=2:batch,fs=2:shard,pp=2:pipe,tp=1:tensor", {"vocab": "split"}),
}
SLOW = list(CASES)
NUM_SEQUENCES, NUM_MICROBATCHES = 16, 2


def shard_squares(config: ModelConfig, mesh: str, **cut: Any) -> tuple[float, list[bool]]:
    """Return the squares of the shards, and of each gradient whether it is the one without them."""
    sizes = {"num_microbatches": NUM_MICROBATCHES, "num_sequences": NUM_SEQUENCES}
    step = pipeline_step(config, mesh=mesh, schedule="1f1b", **sizes, **cut)
    devices = step.model.params.shared["embed"]["table"].sharding.mesh
    ranks = devices.shape[step.model.fns.axes.pipe]
    given: dict[str, Any] = {
        "num_ranks": ranks,
        "num_microbatches": NUM_MICROBATCHES,
        "vocab": cut.get("vocab", "ends"),
    }
    run = partial(pipeline_grads, step.model.fns, mesh=devices, schedule=build_schedule("1f1b", **given))
    asked = jax.jit(lambda params, batch: run(params=params, batch=batch, shard_squares="on"))
    out, (plain, _) = asked(step.params, step.batch), step.run(step.params, step.batch)
    assert plain.shard_squares is None
    return float(out.shard_squares), jax.tree.leaves(jax.tree.map(np.array_equal, out.grads, plain.grads))


def one_device_squares(config: ModelConfig, num_shards: int) -> float:
    """Sum |g_r|^2 of each shard by `jax.grad`, all weights of the other shards' sequences set to 0."""
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))[0]

    def loss_of(params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
        model: Transformer = nnx.merge(graph, params)
        x, _ = model.hidden(batch["tokens"], batch["weights"])
        logits = model.head(x, embedding_VD=model.embed.table[...])
        return cross_entropy(logits, batch["targets"], batch["weights"])

    square = jax.jit(lambda params, batch: global_norm(jax.grad(loss_of)(params, batch)) ** 2)
    batch = masked_batch(NUM_SEQUENCES)
    # A microbatch is cut over the shards: sequence s of B / M is on shard s // (B / M / shards).
    each = NUM_SEQUENCES // NUM_MICROBATCHES
    owner = np.arange(NUM_SEQUENCES) % each // (each // num_shards)
    params = natural_params(config)
    own = [batch | {"weights": batch["weights"] * (owner == shard)[:, None]} for shard in range(num_shards)]
    return sum(float(square(params, part)) for part in own)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_squares_are_those_of_one_device(name: str) -> None:
    config, mesh, cut = CASES[name]
    squares, same = shard_squares(config, mesh, **cut)
    num_shards = 4 if mesh.startswith(("4", "dp")) else 2
    # Sums of squares in float32, of gradients that agree to 1e-6.
    assert squares == pytest.approx(one_device_squares(config, num_shards), rel=1e-5)
    # Nothing else changes, to the digit.
    assert all(same)


@pytest.mark.parametrize(
    ("mesh", "cut", "problem"),
    [
        ("1x2x2", {"vocab": "split"}, "one data shard has the gradient of the whole batch"),
        ("2x1x2", {}, "embedding and head are whole on every rank"),
        ("2x1x1", {"shard": "layer"}, "gather='layer' sums gradients over the shards layer by layer"),
        ("data=2,context=2:context", {}, "with context=2 no device has the whole gradient"),
    ],
)
def test_where_no_shard_has_a_gradient_of_its_own_it_is_refused(mesh: str, cut: dict[str, Any], problem: str) -> None:
    with pytest.raises(ScheduleError, match=problem):
        shard_squares(LLAMA, mesh, **cut)


NUM_SHARDS, NUM_ROWS, WIDTH = 4, 16, 8
Measured = tuple[dict[str, jax.Array], jax.Array]


def quadratic_step(theta: np.ndarray) -> Callable[[dict[str, Any]], Measured]:
    """Return a step whose loss of a sequence x is |theta - x|^2 / 2, of gradient theta - x."""

    def last(shared: jax.Array, x: jax.Array, part: dict[str, jax.Array]) -> jax.Array:
        return 0.5 * jnp.sum(part["weights"] * jnp.sum((shared[None] - x) ** 2, axis=-1, keepdims=True))

    fns = StageFns(
        first=lambda shared, part: part["x"],
        layer=lambda params, x, part: x + 0 * params,
        last=last,
        batch_specs=P(None, "data"),
    )
    params = PipelineParams(stages=jnp.zeros((1, 1, 1)), shared=jnp.asarray(theta))
    given: dict[str, Any] = {"params": params, "mesh": mesh_of(f"{NUM_SHARDS}x1x1")}
    given["schedule"] = build_schedule("gpipe", num_ranks=1, num_microbatches=1)

    @jax.jit
    def step(batch: dict[str, jax.Array]) -> Measured:
        out = pipeline_grads(fns, **given, batch=batch, shard_squares="on")
        squares, norm = jnp.asarray(out.shard_squares), global_norm(out.grads)
        return measure_noise(norm, squares, batch["weights"], num_shards=NUM_SHARDS), out.grads.shared

    return step


# Unequal weights, as masks and packing give them: shard 3 has a fourth of what shard 0 has.
WEIGHTS = np.repeat([4.0, 2.0, 2.0, 1.0], NUM_ROWS // NUM_SHARDS)[None, :, None].astype(np.float32)
WEIGHTS /= WEIGHTS.sum()


def test_signal_and_spread_are_those_of_numpy() -> None:
    theta, x = np.ones(WIDTH, np.float32), np.random.default_rng(1).normal(size=(1, NUM_ROWS, WIDTH))
    noise, grad = quadratic_step(theta)({"x": x.astype(np.float32), "weights": WEIGHTS})
    parts = (WEIGHTS * (theta - x))[0].reshape(NUM_SHARDS, -1, WIDTH).sum(axis=1)
    shares = WEIGHTS.reshape(NUM_SHARDS, -1).sum(axis=1)
    square = np.sum(parts.sum(axis=0) ** 2)
    signal = (square - np.sum(parts**2)) / (1 - np.sum(shares**2))
    np.testing.assert_allclose(grad, parts.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose([noise["signal"], noise["spread"]], [signal, square - signal], rtol=1e-4)


def test_noise_scale_of_a_quadratic_is_the_exact_one() -> None:
    # Gradients of mean theta - mu, and of independent entries with these standard deviations.
    rng, theta, mu = np.random.default_rng(0), np.ones(WIDTH, np.float32), np.full(WIDTH, 0.5)
    deviations = np.linspace(0.5, 2.0, WIDTH)
    step, scale = quadratic_step(theta), NoiseScale(batch_size=NUM_ROWS, num_steps=400)
    for _ in range(400):
        x = (mu + deviations * rng.standard_normal((1, NUM_ROWS, WIDTH))).astype(np.float32)
        noise, _ = step({"x": x, "weights": WEIGHTS})
        scale.add({name: float(value) for name, value in noise.items()})
    exact = np.sum(deviations**2) / np.sum((theta - mu) ** 2)
    # A batch of these weights is as noisy as 1 / sum w^2 sequences of equal weights.
    assert scale.sequences == pytest.approx(exact * NUM_ROWS * np.sum(WEIGHTS**2), rel=0.1)
