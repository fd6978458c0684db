"""The loss of a model on files is that of transformers, on any mesh; each token is predicted once."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trellax.commands.cli import main
from trellax.hub.model_folder import open_model
from trellax.meshes import MeshSpec
from trellax.train import evaluate_files, train
from trellax.train.perplexity.evaluate_files import make_setup, sum_losses
from trellax.train.perplexity.file_tokens import cut_batches

from ...commands.crafted import add_tokenizer
from ...hub.hub import GOLDEN, T, tokens_of

Golden = Callable[[str, str], None]


def write_row(file: Path, row: int) -> Path:
    """Write the text whose tokens are a row of `tokens_of`."""
    file.write_text("".join(chr(32 + number) for number in tokens_of()[row]))
    return file


def losses_of(logits: np.ndarray) -> np.ndarray:
    """Return the mean loss of each row of `tokens_of` by the logits of transformers, [B], in float64."""
    logits, targets = logits[:, :-1].astype(np.float64), tokens_of()[:, 1:, None]
    return (np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets, axis=-1)[..., 0]).mean(-1)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "llama3", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    for row in range(2):
        write_row(tmp_path / f"{row}.txt", row)
    return Path("model")


def test_a_batch_is_rounded_up_to_the_shards_of_the_mesh_once(tmp_path: Path) -> None:
    """Devices along expert are data shards; they count once."""
    shutil.copytree(GOLDEN / "mixtral", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    given: dict[str, Any] = {"seq_len": T, "batch_size": 3, "dtype": None}
    setup = make_setup(open_model(tmp_path / "model"), MeshSpec.parse("expert=2,pipe=2"), **given)
    assert setup.config.train.batch_size == 4


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama3", "data=1"),
        ("qwen3", "tensor=2,pipe=2"),
        ("mixtral", "expert=2"),
        ("gpt2", "context=2"),
        ("mistral", "data=2"),
    ],
)
def test_loss_is_that_of_transformers(name: str, mesh: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / name, tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    files = [write_row(tmp_path / f"{row}.txt", row) for row in range(2)]
    found = evaluate_files(tmp_path / "model", files, mesh=MeshSpec.parse(mesh), seq_len=T, dtype="float32")
    expected = losses_of(np.load(GOLDEN / name / "logits.npy"))
    for own, loss in zip(found, expected, strict=True):
        assert (own.num_tokens, own.num_bytes) == (T - 1, T)
        # Logits differ by up to 2e-4 (tests/hub), the mean of 23 losses by less.
        assert own.loss == pytest.approx(loss, abs=1e-4)
        assert own.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert own.bits_per_byte == pytest.approx(loss * (T - 1) / T / math.log(2), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama2", "qwen3", "mistral", "gpt2"])
def test_perplexity_of_a_long_file_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shutil.copytree(GOLDEN / name, folder := tmp_path / "model")
    add_tokenizer(folder)
    ids = np.random.default_rng(3).integers(0, 64, 1_000)
    (tmp_path / "long.txt").write_text("".join(chr(32 + number) for number in ids))
    (ours,) = evaluate_files(folder, [tmp_path / "long.txt"], seq_len=50, batch_size=4, dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, read = 0.0, transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert read((tmp_path / "long.txt").read_text())["input_ids"] == ids.tolist()
    for start in range(0, ids.size - 1, 50):
        row = torch.tensor(ids[None, start : start + 51])
        with torch.no_grad():
            logits = theirs(row[:, :-1]).logits.double()
        total += float(torch.nn.functional.cross_entropy(logits[0], row[0, 1:], reduction="sum"))
    assert ours.num_tokens == 999
    assert ours.perplexity == pytest.approx(math.exp(total / 999), rel=1e-4)


@given(st.integers(2, 90), st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)))
def test_each_token_but_the_first_is_predicted_once(num_tokens: int, shape: tuple[int, int, int]) -> None:
    tokens, seen = np.arange(num_tokens), []
    for batch, count in cut_batches(tokens, shape=shape):
        counted = batch["weights"] > 0
        assert (batch["tokens"].shape, counted.sum()) == (shape, count)
        assert batch["weights"].sum() == pytest.approx(1, rel=1e-6)
        assert (batch["targets"] == batch["tokens"] + 1)[counted].all()
        seen += batch["targets"][counted].tolist()
    assert seen == list(range(1, num_tokens))


def test_run_has_the_same_loss_on_every_mesh_and_by_file(tiny: Callable[..., Any], tmp_path: Path) -> None:
    summary = train(tiny("--mesh.data 8 --train.batch_size 8 --train.steps 2 --data.seq_len 16"))
    for name, size in {"a.txt": 700, "b.txt": 300}.items():
        (tmp_path / name).write_bytes(bytes(1 + i * i % 251 for i in range(size)))
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    one = evaluate_files(summary.folder, files, seq_len=16)
    split = evaluate_files(summary.folder, files, seq_len=16, mesh=MeshSpec.parse("data=2,tensor=2,pipe=2"))
    assert [own.num_tokens for own in one] == [699, 299]
    assert [own.loss for own in split] == pytest.approx([own.loss for own in one], rel=1e-5)
    both = sum_losses(one, name="both")
    assert both.loss == pytest.approx((one[0].loss * 699 + one[1].loss * 299) / 998)
    assert one[0].bits_per_byte == pytest.approx(one[0].loss / math.log(2) * 699 / 700)


def test_command_prints_a_table_and_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = "".join(json.dumps({"body": Path(f"{row}.txt").read_text()}) + "\n" for row in range(2))
    Path("both.jsonl").write_text(records)
    assert main(["eval", "model", "--data", "?.txt", "--seq-len", "24", "--mesh", "data=2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "documents", "tokens", "loss", "perplexity", "bits/byte"]
    assert [row.split()[:3] for row in rows] == [["0.txt", "1", "23"], ["1.txt", "1", "23"], ["all", "files", "2"]]
    words = ["--data", "both.jsonl", "--text-field", "body", "--json", "--dtype", "float32"]
    assert main(["eval", "model", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    # The end of the first document is predicted too.
    assert [(own["num_documents"], own["num_tokens"], own["num_bytes"]) for own in found["files"]] == [(2, 48, 48)]
    assert found["all"]["perplexity"] == pytest.approx(math.exp(found["all"]["loss"]))


MISTAKES: dict[str, list[str]] = {
    "no_model": ["absent", "--data", "0.txt"],
    "no_file": ["model", "--data", "absent.txt"],
    "one_token": ["model", "--data", "one.txt"],
    "long_sequences": ["model", "--data", "0.txt", "--seq-len", "65"],
    "mesh": ["model", "--data", "0.txt", "--mesh", "tensor=3"],
    "dtype": ["model", "--data", "0.txt", "--dtype", "float16"],
    "batch_size": ["model", "--data", "0.txt", "--batch-size", "0"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_evaluated_is_told(
    name: str, model: Path, capsys: pytest.CaptureFixture[str], golden: Golden
) -> None:
    Path("one.txt").write_text("A")
    assert main(["eval", *MISTAKES[name]]) == 2
    golden(f"errors/commands/eval_{name}.txt", capsys.readouterr().err)
