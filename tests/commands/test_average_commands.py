"""Commands read the average of a run's weights with `--ema`, and say so where there is none."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.hub import load_model
from trellax.train import evaluate, train

pytestmark = pytest.mark.slow

CHOICE = {"last": [], "ema": ["--ema"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, long enough that its average is not its weights."""
    folder = tmp_path_factory.mktemp("average")
    (folder / "corpus.txt").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    own = ["--run.folder", str(folder), "--data.source", "text", "--data.paths", str(folder / "corpus.txt")]
    words = "--mesh.data 4 --mesh.pipe 2 --pipeline.microbatches 2 --train.steps 4 --train.ema 0.9 --run.name run"
    config = load_config("tiny-llama", [*own, *words.split(), "--optimizer.learning_rate", "0.05"])
    train(config, console=Console(file=io.StringIO()))
    return config.run_folder


def call(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    assert main(words) == 0
    return json.loads(capsys.readouterr().out)


def leaves(folder: Path, **weights: Any) -> list[np.ndarray]:
    from flax import nnx

    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(load_model(folder, **weights)))]


def test_exported_average_is_that_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("last", "ema"):
        call(
            [
                "export-hf",
                str(run),
                str(tmp_path / name),
                *CHOICE[name],
                "--architecture",
                "llama",
                "--dtype",
                "float32",
                "--json",
            ],
            capsys,
        )
    for name in ("last", "ema"):
        pairs = zip(leaves(run, weights=name), leaves(tmp_path / name), strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    assert not all(map(np.array_equal, leaves(tmp_path / "last"), leaves(tmp_path / "ema")))
    # Exported weights have no tokenizer of bytes, so the runs' own losses are compared.
    losses = [evaluate(run, weights=name) for name in ("last", "ema")]
    data = ["--data", str(run.parent / "corpus.txt"), "--json"]
    found = [call(["eval", str(run), *CHOICE[name], *data], capsys)["all"]["loss"] for name in ("last", "ema")]
    # Four steps at a high rate: the average is nearer to the first weights, and worse, on both.
    assert losses[0] < losses[1]
    assert found[0] < found[1]


def test_answers_are_those_of_the_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "the quick", "--max-new-tokens", "8", "--json"]
    asked = [call(["generate", str(run), *words, *CHOICE[name]], capsys) for name in ("last", "ema")]
    assert all(len(answers[0]["token_ids"]) == 8 for answers in asked)
    assert asked[0][0]["token_ids"] != asked[1][0]["token_ids"]


def test_hugging_face_folder_has_no_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(["export-hf", str(run), str(tmp_path / "out"), "--architecture", "llama", "--json"], capsys)
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a", "--ema"]) == 2
    assert "is no run folder: only a run holds an average of its weights" in capsys.readouterr().err
