"""Ends that all ranks run together equal one device, for our model and a user's own, with and without gradients."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from trellax.pipeline import PipelineParams, StageFns, natural_order, pipeline_grads, pipeline_loss, stages_from_layers
from trellax.programs.hlo import HloModule, leaves
from trellax.schedules import Schedule, Vocab, build_schedule

from .law import NUM_TOKENS, answer_of, beyond, errors_of, mesh_of, one_device, pipeline_step, small_model

NUM_LAYERS, WIDTH, FEATURES, BATCH = 7, 16, 32, 24
TOLERANCE = 2e-5  # as in test_law.py, for the same reason
COUNTS = (1, 3, 2, 1)


@cache
def arrays() -> tuple[PipelineParams, dict[str, np.ndarray]]:
    """Layers in natural order, the ends whole, and a batch [B, ...]."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)  # noqa: E731
    shared = {"in": draw(FEATURES, WIDTH), "out": {"w": draw(WIDTH, FEATURES)}, "scale": 1 + draw(WIDTH)}
    params = PipelineParams(stages=draw(NUM_LAYERS, WIDTH, WIDTH), shared=shared)
    return params, {"x": draw(BATCH, FEATURES), "y": draw(BATCH, FEATURES)}


def layer(weight: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    return x + jnp.tanh(x @ weight)


def loss_on_one_device(params: PipelineParams, batch: Any) -> jax.Array:
    x = batch["x"] @ params.shared["in"]
    for weight in params.stages:
        x = layer(weight, x, batch)
    error = (x * params.shared["scale"][None]) @ params.shared["out"]["w"] - batch["y"]
    return (error**2).sum() / (BATCH * FEATURES)


def first(shared: Any, microbatch: Any) -> jax.Array:
    """Each rank multiplies its own features, FEATURES@pipe."""
    rank, num_own = jax.lax.axis_index("pipe"), shared["in"].shape[0]
    own = jax.lax.dynamic_slice_in_dim(microbatch["x"], rank * num_own, num_own, axis=1)
    return jax.lax.psum(own @ shared["in"], "pipe")


def last(shared: Any, x: jax.Array, microbatch: Any) -> jax.Array:
    rank, num_own = jax.lax.axis_index("pipe"), shared["out"]["w"].shape[1]
    own = jax.lax.dynamic_slice_in_dim(microbatch["y"], rank * num_own, num_own, axis=1)
    error = (x * shared["scale"][None]) @ shared["out"]["w"] - own
    return jax.lax.psum((error**2).sum(), "pipe") / (BATCH * FEATURES)


SPECS = {"in": P("pipe"), "out": P(None, "pipe"), "scale": P()}
"""`out` is a prefix of its tree."""

FNS = StageFns(first=first, layer=layer, last=last, layers_per_stage=COUNTS, num_layers=sum(COUNTS), shared_specs=SPECS)


@pytest.mark.parametrize("name", [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b", "zb-h1"])
def test_ends_of_ones_own_that_run_together_equal_one_device(name: str) -> None:
    mesh, (params, batch) = mesh_of("2x1x4"), arrays()
    schedule = build_schedule(name, num_ranks=4, num_microbatches=3, vocab="split")
    stages = stages_from_layers(jnp.asarray(params.stages), num_ranks=4, layers_per_stage=COUNTS)
    places = {"in": P("pipe"), "out": {"w": P(None, "pipe")}, "scale": P()}
    there = PipelineParams(
        stages=jax.device_put(stages, NamedSharding(mesh, P(None, "pipe"))),
        shared=jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), params.shared, places),
    )
    cut = {key: leaf.reshape(3, -1, *leaf.shape[1:]) for key, leaf in batch.items()}

    @jax.jit
    def step(params: PipelineParams, batch: Any) -> Any:
        return pipeline_grads(FNS, params=params, batch=batch, mesh=mesh, schedule=schedule, bubbles="nan")

    out = step(there, jax.device_put(cut, NamedSharding(mesh, P(None, "data"))))
    loss, grads = jax.value_and_grad(loss_on_one_device)(params, batch)
    ours = PipelineParams(stages=natural_order(out.grads.stages, layers_per_stage=COUNTS), shared=out.grads.shared)
    for actual, expected in zip(jax.tree.leaves((out.loss, ours)), jax.tree.leaves((loss, grads)), strict=True):
        scale = float(np.abs(expected).max())
        assert np.abs(np.asarray(actual) - np.asarray(expected)).max() <= TOLERANCE * scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "vocab", "layers"), [("1x2x4", "split", (1, 3, 3, 1)), ("2x1x4", "ends", (3, 2, 2, 1))]
)
def test_a_loss_alone_is_the_loss_with_gradients(mesh: str, vocab: Vocab, layers: tuple[int, ...]) -> None:
    config = small_model(embeddings="untied")
    sizes: dict[str, Any] = {"num_microbatches": 4, "num_sequences": 16}
    step = pipeline_step(config, mesh=mesh, schedule="zb-h1", layers_per_stage=layers, vocab=vocab, **sizes)
    schedule = build_schedule("zb-h1", num_ranks=4, num_microbatches=4, vocab=vocab)

    def loss_of(params: PipelineParams) -> jax.Array:
        fns = step.model.fns
        return pipeline_loss(fns, params=params, batch=step.batch, mesh=mesh_of(mesh), schedule=schedule, bubbles="nan")

    alone = jax.jit(loss_of)(step.params)
    loss, grads = jax.jit(jax.value_and_grad(loss_of))(step.params)
    out, _ = step.run(step.params, step.batch)
    assert abs(alone - one_device(config, 16).loss) <= TOLERANCE * abs(alone)
    for actual, expected in zip(jax.tree.leaves((loss, grads)), jax.tree.leaves((out.loss, out.grads)), strict=True):
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize(
    ("mesh", "vocab", "embeddings"),
    [("2x2x2", "split", "tied"), ("1x2x4", "ends", "untied"), ("2x2x1", "ends", "tied")],
)
def test_chunks_of_the_loss_equal_all_logits_at_once(
    mesh: str, vocab: Vocab, embeddings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 tokens of a microbatch and 64 features: two chunks."""
    monkeypatch.setattr("trellax.layers.projected_loss.CHUNK_TOKENS", 1)
    data, tensor, pipe = map(int, mesh.split("x"))
    # Words of a number that no other dimension has, so that logits are known by their shape.
    config = replace(small_model(style="llama", embeddings=embeddings), vocab_size=96)
    num_sequences = 8 * data * 2
    sizes: dict[str, Any] = {"num_microbatches": 2, "num_sequences": num_sequences}
    step = pipeline_step(config, mesh=mesh, schedule="1f1b", vocab=vocab, **sizes)
    assert beyond(errors_of(answer_of(step), one_device(config, num_sequences)), tolerance=TOLERANCE) == {}
    run: Any = step.run
    program = HloModule.parse(run.lower(step.params, step.batch).compile().as_text())
    parts = tensor * pipe if vocab == "split" else tensor
    arrays = {leaf.dims for _, i in program.instructions() for leaf in leaves(i.type)}
    assert (8, 8, 96 // parts) in arrays
    assert (8, NUM_TOKENS, 96 // parts) not in arrays


def test_unequal_chunks_of_a_single_rank_equal_one_device() -> None:
    mesh, (params, batch) = mesh_of("2x1x1"), arrays()
    # An order for one rank with two chunks: it gives the number of microbatches and of chunks alone.
    schedule = Schedule.parse("0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1", name="mine", num_microbatches=2, num_chunks=2)
    whole = StageFns(
        first=lambda shared, microbatch: microbatch["x"] @ shared["in"],
        layer=layer,
        last=lambda shared, x, microbatch: (
            (((x * shared["scale"][None]) @ shared["out"]["w"] - microbatch["y"]) ** 2).sum() / (BATCH * FEATURES)
        ),
        layers_per_stage=(2, 5),
        num_layers=7,
    )
    stages = stages_from_layers(jnp.asarray(params.stages), num_ranks=1, num_chunks=2, layers_per_stage=(2, 5))
    cut = {key: leaf.reshape(2, -1, *leaf.shape[1:]) for key, leaf in batch.items()}
    there = PipelineParams(stages=stages, shared=params.shared)
    out = jax.jit(lambda p, b: pipeline_grads(whole, params=p, batch=b, mesh=mesh, schedule=schedule))(there, cut)
    loss, grads = jax.value_and_grad(loss_on_one_device)(params, batch)
    ours = natural_order(out.grads.stages, layers_per_stage=(2, 5))
    assert abs(float(out.loss) - float(loss)) <= TOLERANCE * float(loss)
    assert np.abs(ours - grads.stages).max() <= TOLERANCE * np.abs(grads.stages).max()


def test_padding_has_no_gradient() -> None:
    config = small_model()
    sizes: dict[str, Any] = {"num_microbatches": 2, "num_sequences": 16}
    step = pipeline_step(config, mesh="1x2x4", schedule="1f1b", layers_per_stage=(1, 3, 3, 1), **sizes)
    out, _ = step.run(step.params, step.batch)
    for leaf in jax.tree.leaves(out.grads.stages):
        assert leaf[0, 1].any()
        assert not leaf[0, 0, 1:].any()
        assert not leaf[0, 3, 1:].any()
