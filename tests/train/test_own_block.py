"""A block that a TOML file names by its module trains on pipe x tensor x data, and the run is used like any other."""

import json
from pathlib import Path

import jax
import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.layers import param_counts
from trellax.meshes import build_mesh
from trellax.train import Setup, evaluate, make_train_step
from trellax.train.metrics import read_metrics

MODULE = """
import jax
import jax.numpy as jnp
from flax import nnx
from trellax.layers import Attention, ColumnLinear, RowLinear
from trellax.layers.dropout import dropout
from trellax.layers.norms import make_norm, normalize
from trellax.pipeline import Output


class NoisyBlock(nnx.Module):
    def __init__(self, config, *, rngs, rules):
        self.norm = make_norm(config, rngs=rngs, rules=rules)
        self.attention = Attention(config, rngs=rngs, rules=rules)
        self.up = ColumnLinear(config.hidden_size, 48, dim="inner", rngs=rngs, rules=rules)
        self.down = RowLinear(48, config.hidden_size, dim="inner", rngs=rngs, rules=rules)

    def __call__(self, x_BTD, *, microbatch, info):
        n_BTD = normalize(self.norm, x_BTD)
        y_BTD = self.attention(n_BTD) + self.down(jax.nn.silu(self.up(n_BTD)))
        if info.key is not None:
            y_BTD = dropout(y_BTD, rate=0.1, keys=info.keys())
        size = jnp.sum((y_BTD**2).mean(-1) * microbatch["weights"])
        return Output(x=x_BTD + y_BTD, loss=0.01 * size, metrics={"size": size})
"""

CONFIG = """
[model]
vocab_size = 256
num_layers = 2
hidden_size = 16
num_heads = 2
max_tokens = 16
block = "{module}:NoisyBlock"
dims = ["inner=tensor"]
[data]
source = "text"
paths = ["corpus.txt"]
seq_len = 16
[train]
steps = 2
batch_size = 8
log_every = 1
eval_batches = 1
[optimizer]
learning_rate = 1e-2
[pipeline]
microbatches = 2
"""
MESH = "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a module, a corpus and a config; each has a module of another name."""
    monkeypatch.chdir(tmp_path)
    name = f"blocks_of_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(MODULE)
    Path("own.toml").write_text(CONFIG.format(module=name))
    Path("corpus.txt").write_bytes(bytes(1 + i * i % 251 for i in range(20_000)))
    return tmp_path


def train(words: str) -> list[dict[str, float]]:
    assert main(["train", "own.toml", *words.split()]) == 0
    return read_metrics(Path("runs") / words.rsplit(maxsplit=1)[-1])


@pytest.mark.usefixtures("folder")
def test_step_of_a_toml_path_is_traced_on_2x2x2() -> None:
    """Without its compilation, which takes 15 seconds: all that can be wrong about a class is told before it."""
    config = load_config("own.toml", MESH)
    setup = Setup(config, build_mesh(config.mesh))
    state, metrics = jax.eval_shape(make_train_step(setup), setup.shapes, setup.batch_shapes)
    assert jax.tree.map(lambda leaf: leaf.shape, state) == jax.tree.map(lambda leaf: leaf.shape, setup.shapes)
    assert set(metrics.block) == {"size", "layer_loss"}
    kernel = state.params.stages["up"]["kernel"]
    assert setup.shardings.params.stages["up"]["kernel"].shard_shape(kernel.shape) == (1, 1, 1, 16, 24)


@pytest.mark.slow
def test_block_of_a_toml_path_trains_on_2x2x2(folder: Path) -> None:
    first, last = train(f"{MESH} --run.name own")[:2]
    assert last["loss"] < first["loss"] < 5.7
    # The loss is that of the text: what the block adds is logged beside it.
    assert first["block.layer_loss"] == pytest.approx(0.01 * first["block.size"], rel=1e-5)
    assert "val_loss" in read_metrics(folder / "runs/own")[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_run_is_the_same_on_every_mesh_and_schedule() -> None:
    """Its dropout and losses of layers too; sums in another order are what differs."""
    one = train("--mesh.data 8 --pipeline.microbatches 1 --run.name one")
    for name, words in {
        "whole": f"{MESH} --train.shard layer",
        "split": "--mesh.data 4 --mesh.pipe 2 --pipeline.schedule zb-h1",
        "tensor": "--mesh.data 4 --mesh.tensor 2 --pipeline.microbatches 1 --pipeline.remat full",
    }.items():
        other = train(f"{words} --run.name {name}")
        for mine, its in zip(one, other, strict=True):
            for key in {"loss", "grad_norm", "block.size", "val_loss"} & set(mine):
                assert mine[key] == pytest.approx(its[key], rel=2e-5), (name, key)


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_run_resumes_and_is_evaluated(capsys: pytest.CaptureFixture[str]) -> None:
    constant = "--optimizer.lr_schedule constant"
    whole = train(f"{MESH} --train.steps 4 {constant} --run.name whole")
    train(f"{MESH} {constant} --run.name parts")
    parts = train(f"--override --mesh.data 4 --mesh.tensor 2 --train.steps 4 {constant} --run.name parts")
    found = [[line["loss"] for line in run if "loss" in line] for run in (whole, parts)]
    assert found[1] == pytest.approx(found[0], rel=2e-5)
    assert evaluate("runs/whole") == pytest.approx(whole[-1]["val_loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["generate", "runs/whole", "--prompt", "a"]) == 2
    assert "NoisyBlock has no method extend" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_describe_counts_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "own.toml", *MESH.split(), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    counts = param_counts(load_config("own.toml").model)
    # Norm, attention and the two layers by hand: D = 16, 48 features inside.
    assert counts.block == 2 * 16 + 4 * (16 * 16 + 16) + (16 * 48 + 48) + (48 * 16 + 16)
    assert sum(row["bytes"] for row in numbers["parameters"]) == 4 * counts.total
    assert sum(stage["parameters"] for stage in numbers["stages"]) == counts.total


@pytest.mark.slow
@pytest.mark.usefixtures("folder")
def test_plan_and_inspect_say_what_their_counts_rest_on(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("plan own.toml --topology h100x8", f"inspect own.toml --target cpu:8 {MESH}"):
        assert main(words.split()) == 0
        assert ":NoisyBlock counts by the matrix products in its jaxpr" in capsys.readouterr().out
