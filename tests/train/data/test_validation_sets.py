"""Further validation sets: each is held out whole, has its own name everywhere, and the same loss on every mesh."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.configs.check import check_run
from trellax.configs.run_config import DataSection
from trellax.meshes import ConfigError, DataError
from trellax.train import evaluate_files, train
from trellax.train.data.corpus import check_vocabulary, load_corpus
from trellax.train.metrics import MetricsLog, draw_loss, read_metrics, read_summary
from trellax.train.metrics.log import set_metrics
from trellax.train.metrics.run_rows import read_run_row

WORDS = "--data.seq_len 16 --train.eval_batches 64 --data.source text"
SETS = "--data.validation wiki=wiki.txt,code=code.jsonl"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_bytes(bytes(97 + i * i % 23 for i in range(6_000)))
    Path("wiki.txt").write_bytes(b"the sum of two and two is four. " * 20)
    Path("code.jsonl").write_text("".join(json.dumps({"text": f"x = {i}\n"}) + "\n" for i in range(80)))


def load(*sets: str, **values: Any) -> Any:
    section = {"source": "text", "seq_len": 16, "paths": ("corpus.txt",), "validation": sets} | values
    return load_corpus(DataSection.model_validate(section))


def test_sets_are_whole_and_no_part_of_the_corpus() -> None:
    corpus = load("wiki=wiki.txt", "code=code.jsonl", "wiki=corpus.txt")
    sets = dict(corpus.sets)
    assert {name: (own.train.size, own.validation.size) for name, own in sets.items()} == {
        "wiki": (0, 6_000 + 32 * 20 + 1),
        "code": (0, sum(len(f"x = {i}\n") for i in range(80))),
    }
    assert corpus.sha256 == load().sha256
    np.save("ids.npy", np.arange(300, dtype=np.uint16))
    tokens = load("other=ids.npy", source="tokens", paths=("ids.npy",), val_fraction=0.3)
    Path("ids.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"ids\.npy"):
        tokens.check_files()
    assert load("wiki=wiki.txt", source="stdlib", paths=()).sets[0][1].validation.size == 32 * 20


def test_mistakes_name_the_set() -> None:
    for entry in ("wiki", "=a.txt", "wiki=", "a b=c.txt", "a/b=c.txt"):
        with pytest.raises(ConfigError, match=r"expected name=path, such as wiki=wiki\.jsonl"):
            load_config("tiny-llama", ["--data.validation", json.dumps([entry])])
    config = load_config("tiny-llama", f"{WORDS} --data.paths corpus.txt --data.validation wiki=wik.txt")
    with pytest.raises(DataError, match=r"data\.validation, wiki: 'wik\.txt' does not exist. Did you mean 'wiki\.txt'"):
        check_run(config, num_devices=1, corpus="needed")
    Path("short.txt").write_bytes(b"short")
    with pytest.raises(DataError, match="validation set wiki: the validation part of the corpus has 5 of 5 tokens"):
        load("wiki=short.txt")
    np.save("large.npy", np.arange(100, dtype=np.uint16) + 900)
    np.save("small.npy", np.arange(100, dtype=np.uint16))
    with pytest.raises(DataError, match="token id 999"):
        check_vocabulary(load("l=large.npy", source="tokens", paths=("small.npy",), val_fraction=0.3), vocab_size=500)


def test_runs_have_a_column_for_each_set(capsys: pytest.CaptureFixture[str]) -> None:
    for name, losses in {"a": {"wiki": 2.5, "code": 1.25}, "b": {"code": 3.0}, "c": {}}.items():
        with MetricsLog(Path("runs") / name) as log:
            log.write(1, {"loss": 4.0, "val_loss": 3.5} | set_metrics({one: loss + 1 for one, loss in losses.items()}))
            log.write(2, set_metrics(losses))
    assert main(["runs", "runs"]) == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head[3:8] == ["loss", "val", "loss", "wiki", "code"]
    assert [row[3 + (row[1] == "not") : -2] for row in rows] == [
        ["4.0000", "3.5000", "2.5000", "1.2500"],
        ["4.0000", "3.5000", "3.0000"],
        ["4.0000", "3.5000"],
    ]
    assert main(["runs", "compare", "runs/a", "runs/b", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["val_losses"] for run in runs] == [{"wiki": 2.5, "code": 1.25}, {"code": 3.0}]
    draw_loss("runs/a")


@pytest.mark.slow
def test_each_set_has_its_name_in_lines_summary_and_runs(tiny: Callable[..., Any]) -> None:
    config = tiny(f"{WORDS} {SETS} --mesh.data 8 --train.batch_size 8 --train.steps 2 --train.eval_every 1")
    summary = train(config)
    losses = [line for line in read_metrics(config.run_folder) if "val_loss/wiki" in line]
    assert [line["step"] for line in losses] == [1, 2]
    assert {"wiki": losses[1]["val_loss/wiki"], "code": losses[1]["val_loss/code"]} == summary.final_val_losses
    assert summary.final_val_loss not in summary.final_val_losses.values()
    assert read_summary(config.run_folder) == summary
    assert read_run_row(config.run_folder).val_losses == summary.final_val_losses
    # All of a set was validated on, in windows whose first tokens are the last of those before: as `trellax eval` does.
    (wiki,) = evaluate_files(config.run_folder, ["wiki.txt"], seq_len=16)
    assert summary.final_val_losses["wiki"] == pytest.approx(wiki.loss, rel=0.02)


@pytest.mark.slow
def test_losses_of_sets_are_those_of_any_mesh_and_change_no_training(tiny: Callable[..., Any]) -> None:
    words = f"{WORDS} --train.batch_size 16 --train.steps 2 --pipeline.microbatches 2"
    meshes = {"one": "--mesh.data 8", "other": "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2"}
    one, other = (train(tiny(f"{words} {SETS} {mesh} --run.name {name}")) for name, mesh in meshes.items())
    assert one.final_val_losses == pytest.approx(other.final_val_losses, rel=1e-5)
    without = train(tiny(f"{words} {meshes['one']} --run.name without"))
    assert (without.final_train_loss, without.final_val_loss) == (one.final_train_loss, one.final_val_loss)
