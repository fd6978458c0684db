"""A model trained on bytes is exported with a tokenizer.json whose tokens are bytes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.hub import ByteTokenizer
from trellax.hub.byte_tokenizer import byte_tokenizer
from trellax.hub.model_folder import open_model
from trellax.train import evaluate_files, train

TOKENIZER = byte_tokenizer()


@given(st.text())
def test_tokens_are_the_bytes_of_a_text(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert ids == ByteTokenizer().encode(text)
    assert TOKENIZER.decode(ids) == text


def test_every_byte_has_its_own_token() -> None:
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(256))


@pytest.mark.slow
def test_an_exported_run_is_evaluated_as_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("three times three is nine, ≤ ten\n" * 200)
    words = "--data.source text --data.paths notes.txt --train.steps 2 --train.eval_batches 1 --mesh.data 8"
    folder = train(load_config("tiny-dense", words)).folder
    assert main(["export-hf", folder, "exported"]) == 0
    assert open_model("exported").tokenizer.encode("é") == [0xC3, 0xA9]
    assert evaluate_files("exported", ["notes.txt"]) == evaluate_files(folder, ["notes.txt"])
