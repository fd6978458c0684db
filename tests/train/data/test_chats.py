"""Chats give the tokens of their template, answers alone count, and raw records and shards are one corpus."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.commands.cli import main
from trellax.configs.run_config import DataSection
from trellax.hub.tokenizer import load_tokenizer
from trellax.meshes import DataError
from trellax.train import train
from trellax.train.data.batches import Batches
from trellax.train.data.corpus import load_corpus
from trellax.train.data.shards.prepare_tokens import prepare_tokens

from ...hub.chat.chats import CHATML, MARKED, REASONING, chat, write_tokenizer

CHATS = [chat(f"what is {i}?", f"four and {i * i}", "and two?", "sum" * (i % 5 + 1)) for i in range(60)]
START, END = 1, 2


def load(*paths: str, **values: Any) -> Any:
    section = {"source": "chat", "tokenizer": "bpe", "seq_len": 16, "val_fraction": 0.25, "paths": paths} | values
    return load_corpus(DataSection.model_validate(section))


def write_lines(file: str, chats: list[Any], **others: Any) -> str:
    Path(file).write_text("".join(json.dumps({"messages": own} | others) + "\n" for own in chats), encoding="utf-8")
    return file


def prepare(*files: str, out: str, **options: Any) -> dict[str, Any]:
    options = {"tokenizer": "bpe", "field": "messages", "holds": "messages", **options}
    return prepare_tokens([Path(file) for file in files], out=Path(out), **options)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tokenizer(Path("bpe"), template=MARKED)
    write_lines("chats.jsonl", CHATS, id=1)


def test_targets_that_count_are_those_of_answers() -> None:
    corpus, tokenizer = load("chats.jsonl"), load_tokenizer("bpe").tokenizer
    (source,) = corpus.train_sources
    assert source.mask is not None
    tokens, mask = np.asarray(source.tokens), np.asarray(source.mask)
    text = tokenizer.decode(tokens[mask == 1].tolist(), skip_special_tokens=False)
    answers = "".join(f"{message['content']}<|im_end|>" for own in CHATS for message in own[1::2])
    assert answers.startswith(text)
    assert len(text) > 0.7 * len(answers)
    assert "60 chats in 1 file by bpe/tokenizer.json, " in corpus.description
    batch = Batches(corpus.train_sources, seq_len=16, batch_size=4, microbatches=2, seed=0)[3]
    assert batch["weights"].sum() == pytest.approx(1)
    assert not (batch["weights"][batch["targets"] == START] > 0).any()


def test_packing_cuts_where_chats_end_and_not_where_messages_do() -> None:
    batches = Batches(load("chats.jsonl", packing="on").train_sources, seq_len=64, batch_size=4, microbatches=1, seed=0)
    for step in range(4):
        batch = batches[step]
        first = (np.diff(batch["segments"], axis=-1) != 0).sum()
        # Each chat begins with the token that begins a text; a message of four ends with END.
        assert first == (batch["tokens"][..., 1:] == 0).sum()
        assert (batch["tokens"] == END).sum() > 2 * first


@pytest.mark.parametrize("template", [MARKED, CHATML])
def test_shards_and_records_are_one_corpus(template: str) -> None:
    write_tokenizer(Path("bpe"), template=template)
    index = prepare("chats.jsonl", out="out", shard_bytes=2_000)
    assert (index["num_documents"], index["end_id"], len(index["shards"]) > 3) == (60, None, True)
    ours, theirs = load("out", source="tokens", tokenizer="bytes", packing="on"), load("chats.jsonl", packing="on")
    assert ours.sha256 == theirs.sha256
    first, second = (own.documents.is_last(np.asarray(own.train), start=0).tolist() for own in (ours, theirs))
    assert first == second
    assert np.array_equal(ours.mask, theirs.mask)
    assert load("out", source="tokens", tokenizer="bytes").sha256 == ours.sha256
    # A run folder gets the template too, so that the model can be served.
    assert Path("out/chat_template.jinja").is_file()


def test_tables_hold_the_chats_of_the_lines() -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    # Rows of one field have all its names: the null is not of the message.
    rows = [[message | {"name": None} for message in own] for own in CHATS]
    table = pyarrow.table({"messages": rows, "id": [str(i) for i in range(60)]})
    parquet.write_table(table, "chats.parquet")
    with pyarrow.OSFile("chats.arrow", "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    expected = load("chats.jsonl").sha256
    assert [load(name).sha256 for name in ("chats.parquet", "chats.arrow")] == [expected, expected]
    with pytest.raises(DataError, match="the column id is string, no list of messages"):
        load("chats.parquet", text_field="id")


def test_damaged_chats_are_left_out_and_named() -> None:
    chats: list[Any] = [*CHATS]
    chats[3], chats[40] = chat("a", "b", "c", "d")[1:], None
    write_lines("damaged.jsonl", chats)
    index = prepare("damaged.jsonl", out="out", shard_bytes=2_000, max_damaged=0.1)
    first = "damaged.jsonl:4: message 1, of the role assistant, comes first: roles out of order."
    assert index["damaged"] == [first, "damaged.jsonl:41: None is no list of messages."]
    assert (index["num_damaged"], index["num_documents"]) == (2, 58)
    with pytest.raises(DataError, match=r"2 of 60 records are damaged, more than 0\.1%:\n  damaged\.jsonl:4: message"):
        load("damaged.jsonl")


MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "no template": (
        lambda: [Path("bpe/chat_template.jinja").unlink(), load("chats.jsonl")],
        "bpe has no chat template, so messages have no text there",
    ),
    "broken template": (
        lambda: [write_tokenizer(Path("bpe"), template="{% if %}"), load("chats.jsonl")],
        "the chat template is broken",
    ),
    "rewritten answers": (
        lambda: [write_tokenizer(Path("bpe"), template=REASONING), load("chats.jsonl")],
        "chats.jsonl:1: the chat template writes message 2 in another way",
    ),
    "text": (lambda: [Path("a.txt").write_text("a"), load("a.txt")], "a.txt: chats are records, and this is no file"),
    "no field": (
        lambda: load("chats.jsonl", text_field="chats"),
        "no field 'chats'; the fields are 'messages'",
    ),
    "bytes": (lambda: prepare("chats.jsonl", out="x", tokenizer="bytes"), "bytes have none"),
    "lost mask": (
        lambda: [
            prepare("chats.jsonl", out="out", shard_bytes=2_000),
            Path("out/tokens-00001.mask.npy").unlink(),
            load("out", source="tokens", tokenizer="bytes"),
        ],
        "out/tokens-00001.mask.npy is lost",
    ),
    "changed mask": (
        lambda: [
            prepare("chats.jsonl", out="out"),
            np.save("out/tokens-00000.mask.npy", 1 - np.load("out/tokens-00000.mask.npy")),
            load("out", source="tokens", tokenizer="bytes"),
        ],
        "out/tokens-00000.mask.npy: its sha256 is",
    ),
    "other template": (
        lambda: [
            prepare("chats.jsonl", out="out"),
            write_tokenizer(Path("bpe"), template=CHATML),
            prepare("chats.jsonl", out="out"),
        ],
        "out holds the tokens of another corpus: these have changed: the chat template",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str) -> None:
    make, message = MISTAKES[name]
    with pytest.raises(DataError, match=message):
        make()


def test_command_prepares_chats(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "prepare", "chats.jsonl", "--chat", "--tokenizer", "bpe", "--processes", "1", "--out"]
    assert main([*words, "out"]) == 0
    assert "tokens of 60 documents in " in capsys.readouterr().out
    assert load("out", source="tokens", tokenizer="bytes").sha256 == load("chats.jsonl").sha256
    words = ["data", "train-tokenizer", "chats.jsonl", "--chat", "--vocab-size", "300", "--out", "x"]
    assert main(words) == 2
    assert "--chat is for `trellax data prepare`" in capsys.readouterr().err


@pytest.mark.slow
def test_losses_are_those_of_shards_on_any_mesh(tiny: Callable[..., Any]) -> None:
    prepare("chats.jsonl", out="out", shard_bytes=900)
    words = "--train.batch_size 8 --train.steps 3 --data.seq_len 32 --data.val_fraction 0.2 --model.vocab_size 320"
    formats = {"lines": "chat --data.paths chats.jsonl --data.tokenizer bpe", "shards": "tokens --data.paths out"}
    meshes = {"one": "--mesh.data 8", "other": "--mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 2"}
    losses = {}
    for mesh, sizes in meshes.items():
        for name, source in formats.items():
            run = f"{words} {sizes} --data.packing on --run.name {name}-{mesh} --data.source {source}"
            summary = train(tiny(run))
            losses[name, mesh] = (summary.final_train_loss, summary.final_val_loss)
    assert losses["lines", "one"] == losses["shards", "one"]
    assert losses["lines", "one"] == pytest.approx(losses["lines", "other"], rel=1e-5)
