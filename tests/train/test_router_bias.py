"""Biases of routers move with the load of the whole batch, alike on every mesh, and even it out."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from trellax.configs import RunConfig, load_config
from trellax.layers import Transformer
from trellax.layers.block import stacks_of
from trellax.layers.context.places import order_chunks
from trellax.meshes import build_mesh
from trellax.pipeline import natural_order
from trellax.train import Batches, Checkpoints, Setup, TrainState, load_corpus, make_train_step

NUM_STEPS = 4
# As in test_step.py, where the reasons are.
SMOOTH = "--optimizer.epsilon 1e-3 --optimizer.warmup_steps 1"
TOLERANCE = 2e-5
RATE = 0.002
BIASED = f"--model.router_bias on --model.router_bias_rate {RATE} --model.router sigmoid --model.balance_loss 0.0"
MIXED = f"{BIASED} --model.num_layers 5 --model.dense_layers 2 --model.ffn_size 96"
SMALL = "--train.batch_size 16 --pipeline.microbatches 2 --data.seq_len 32"

LAYOUTS = [
    ("data=2,expert=2,pipe=2", "--pipeline.schedule zb-h1"),
    pytest.param("expert=2,tensor=2,pipe=2", "--train.shard optimizer", marks=pytest.mark.slow),
    pytest.param("expert=4,tensor=2", "--train.shard layer", marks=pytest.mark.slow),
    pytest.param("data=2,pipe=4", "--pipeline.layers_per_stage 1,2,1,1", marks=pytest.mark.slow),
    pytest.param("context=2,expert=2,pipe=2", "", marks=pytest.mark.slow),
    pytest.param("expert=2,context_expert=2,pipe=2", "--train.shard layer", marks=pytest.mark.slow),
    pytest.param("expert=2,pipe=2", "--pipeline.schedule zb-v --pipeline.chunks 2", marks=pytest.mark.slow),
    pytest.param("data=2,pipe=2", "--train.offload optimizer", marks=pytest.mark.slow),
]

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Configure:
    folder = tmp_path_factory.mktemp("router_bias")
    corpus = folder / "corpus.txt"
    corpus.write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    words = ["--data.source", "text", "--data.paths", str(corpus), "--run.folder", str(folder)]

    def read(more: str, mesh: str = "data=1") -> RunConfig:
        sizes = [part for axis in mesh.split(",") for part in f"--mesh.{axis}".split("=")]
        return load_config("tiny-moe", [*words, *SMOOTH.split(), *SMALL.split(), *more.split(), *sizes])

    return read


def setup_of(config: RunConfig) -> Setup:
    devices = jax.devices()[: config.mesh.num_devices]
    return Setup(config, build_mesh(config.mesh, devices=devices))


class Run:
    """Steps of a config on its mesh, one by one."""

    def __init__(self, config: RunConfig) -> None:
        self.setup = setup_of(config)
        self.step = make_train_step(self.setup)
        self.state = self.setup.init_state()
        sizes: dict[str, Any] = {"seq_len": config.data.seq_len, "batch_size": config.train.batch_size}
        sizes |= {"microbatches": config.pipeline.microbatches, "seed": 0}
        self.batches = Batches(load_corpus(config.data).train, **sizes)

    def take(self, count: int) -> list[Any]:
        """Take steps, and return their metrics."""
        found = []
        for _ in range(count):
            ranks = self.setup.sizes.context
            batch = {
                name: order_chunks(leaf, num_ranks=ranks) for name, leaf in self.batches[int(self.state.step)].items()
            }
            batch = jax.device_put(batch, self.setup.batch_sharding)
            self.state, metrics = self.step(self.state, batch)
            found.append(metrics)
        return found

    @property
    def params(self) -> dict[str, Any]:
        """Parameters in the order of the model, in numpy."""
        return params_of(self.setup, self.state)


def params_of(setup: Setup, state: TrainState) -> dict[str, Any]:
    fns = setup.model.fns
    cut: dict[str, Any] = {"layers_per_stage": fns.layers_per_stage, "placement": setup.placement}
    blocks = natural_order(state.params.stages, pattern=fns.pattern, **cut)
    return jax.device_get({"blocks": blocks, **state.params.shared})


def bias_of(params: dict[str, Any]) -> np.ndarray:
    blocks = params["blocks"]
    return np.asarray(blocks.get("experts", blocks)["mlp"]["router"]["bias"])


def loads_of(config: RunConfig, params: dict[str, Any], batch: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens of each expert of each layer, [L, E], by the layers of a plain model on one device, without a pipeline."""
    graph = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))))[0]
    model: Transformer = nnx.merge(graph, jax.tree.map(jnp.asarray, params))
    x = model.embed(jnp.asarray(batch["tokens"].reshape(-1, config.data.seq_len)))
    found: dict[str, Any] = {}
    for stack in stacks_of(model.blocks):
        own, stacked = nnx.split(stack)

        def layer(x: Any, params: Any, own: Any = own) -> Any:
            y, stats = nnx.merge(own, params).run(x)
            return y, stats.metrics

        x, found = jax.lax.scan(layer, x, stacked)
    return np.asarray(found["expert_tokens"])


@pytest.fixture(scope="module")
def one_device(configure: Configure) -> tuple[Run, list[dict[str, Any]], list[float]]:
    """A run on one device, its parameters before each step and after the last, and its losses."""
    run = Run(configure(MIXED))
    params, losses = [run.params], []
    for _ in range(NUM_STEPS):
        losses += [float(metrics.loss) for metrics in run.take(1)]
        params.append(run.params)
    return run, params, losses


def test_biases_follow_the_loads_of_a_plain_model(one_device: Any) -> None:
    run, params, _ = one_device
    for step, (before, after) in enumerate(pairwise(params)):
        loads = loads_of(run.setup.config, before, run.batches[step])
        assert loads.sum(-1).tolist() == [2 * 16 * 32] * 3
        expected = bias_of(before) + np.float32(RATE) * np.sign(loads.mean(-1, keepdims=True) - loads)
        np.testing.assert_allclose(bias_of(after), expected, rtol=0, atol=1e-7)
    # Moved on from where they were, so that later steps choose other experts.
    assert np.abs(bias_of(params[-1])).max() > 2.5 * RATE


@pytest.mark.parametrize(("mesh", "words"), LAYOUTS)
def test_steps_with_moving_biases_equal_one_device(
    mesh: str, words: str, configure: Configure, one_device: Any
) -> None:
    run, (_, params, losses) = Run(configure(f"{MIXED} {words}", mesh)), one_device
    np.testing.assert_allclose([float(m.loss) for m in run.take(NUM_STEPS)], losses, rtol=TOLERANCE)
    expected = dict(jax.tree_util.tree_leaves_with_path(params[-1]))
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params):
        assert np.abs(leaf - expected[path]).max() <= TOLERANCE * np.abs(expected[path]).max(), path


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("expert=2,pipe=2", ""),
        pytest.param("data=2,pipe=4", "--train.offload optimizer", marks=pytest.mark.slow),
        pytest.param("expert=2,context_expert=2,pipe=2", "--train.shard layer", marks=pytest.mark.slow),
        pytest.param("expert=2,pipe=2", "--pipeline.schedule zb-v --pipeline.chunks 2", marks=pytest.mark.slow),
    ],
)
def test_a_state_of_two_kinds_moves_to_another_mesh_and_back(
    mesh: str, words: str, configure: Configure, tmp_path: Path
) -> None:
    one, other = setup_of(configure(f"{MIXED} {words}", "data=2,pipe=2")), setup_of(configure(f"{MIXED} {words}", mesh))
    state = one.init_state()
    # Random numbers tell the layers apart; biases start as zeros.
    bias = state.params.stages["experts"]["mlp"]["router"]
    bias["bias"] = bias["bias"] + jax.random.normal(jax.random.key(0), bias["bias"].shape)
    there = moved(state, one, other, tmp_path / "there")
    back = moved(there, other, one, tmp_path / "back")
    found = [jax.tree.leaves(params_of(*pair)) for pair in ((one, state), (other, there), (one, back))]
    for first, second, third in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh_with_its_biases(configure: Configure, tmp_path: Path) -> None:
    saved, other = (Run(configure(MIXED, mesh)) for mesh in ("data=2,pipe=4", "expert=2,pipe=2"))
    saved.take(2)
    other.state = moved(saved.state, saved.setup, other.setup, tmp_path)
    saved.take(2)
    other.take(2)
    np.testing.assert_array_equal(bias_of(saved.params), bias_of(other.params))


def moved(state: TrainState, one: Setup, other: Setup, folder: Path) -> TrainState:
    """Return the state that another setup restores from what the first saves."""
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(state, one)
        checkpoints.wait()
        return checkpoints.restore(other)


def test_a_bad_step_leaves_the_biases_alone(configure: Configure) -> None:
    run = Run(configure(f"{BIASED} --model.num_layers 1 --pipeline.microbatches 1 --train.bad_step skip"))
    run.take(1)
    before = run.params
    batch = jax.device_put(run.batches[1], run.setup.batch_sharding)
    bad = batch | {"weights": batch["weights"] * np.float32("nan")}
    run.state, metrics = run.step(run.state, bad)
    assert not bool(metrics.taken)
    np.testing.assert_array_equal(bias_of(run.params), bias_of(before))
    assert np.abs(bias_of(before)).max() > 0


def test_biases_even_the_load_out(configure: Configure) -> None:
    """A router that prefers an expert: with biases the peak falls, without it stays."""
    peaks = {}
    for name in ("on", "off"):
        more = f"--model.router_bias {name} --model.router_bias_rate 0.005 --optimizer.learning_rate 1e-5"
        run = Run(configure(f"{BIASED} --model.num_layers 1 {more}"))
        params = run.state.params
        # All tokens have a feature in common, and the first expert likes it.
        params.shared["embed"]["table"] += np.float32(0.05)
        router = params.stages["mlp"]["router"]
        router["weight"] = router["weight"].at[..., 0].add(np.float32(0.02))
        peaks[name] = [float(metrics.router["expert_peak"]) for metrics in run.take(40)]
    # Of 8 experts, of which a token uses 2, one that all tokens use has four times the mean.
    assert peaks["on"][0] == peaks["off"][0] > 3.5
    assert peaks["off"][-1] > 3.5
    assert max(peaks["on"][-5:]) < 2.0
