"""Documents are put into a random order whole, each once, with their masks and their ends; the seed says which."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError
from trellax.train import train
from trellax.train.data.batches import Batches
from trellax.train.data.corpus import load_corpus
from trellax.train.data.joined_tokens import JoinedTokens, PermutedTokens, read_tokens
from trellax.train.data.shuffle_documents import shuffled_sources

TEXTS = [f"{i:03}:{'x' * (i % 11)}\n" for i in range(80)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 99), st.integers(0, 50), st.integers(0, 50))
def test_permuted_tokens_read_as_the_permuted_array(sizes: list[int], seed: int, start: int, count: int) -> None:
    ends = np.cumsum(sizes) - 1
    tokens = np.arange(ends[-1] + 1)
    order = np.random.default_rng(seed).permutation(len(sizes))
    whole = np.concatenate([np.split(tokens, ends[:-1] + 1)[document] for document in order])
    cut = seed % (tokens.size + 1)
    for given_tokens in (tokens, JoinedTokens([tokens[:cut], tokens[cut:]])):
        permuted = PermutedTokens(given_tokens, ends=ends, order=order)
        assert (permuted.size, permuted.read(0, tokens.size).tolist()) == (tokens.size, whole.tolist())
        assert permuted.read(start, count).tolist() == whole[start : start + count].tolist()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(TEXTS):
        Path(f"{i:03}.txt").write_text(text)
    ids = np.frombuffer("".join(TEXTS).encode(), np.uint8).astype(np.uint16)
    np.save("ids.npy", ids)
    np.save("ids.mask.npy", (ids == ord("x")).astype(np.uint8))


def load(*paths: str, **values: Any) -> Any:
    section = {"seq_len": 8, "val_fraction": 0.1, "paths": paths, "shuffle": "documents"} | values
    return load_corpus(DataSection.model_validate(section))


@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("source", ["text", "tokens"])
def test_every_document_is_there_once_in_an_order_of_the_seed(source: str, packing: str) -> None:
    paths = ("*.txt",) if source == "text" else ("ids.npy",)
    values = {"source": source, "packing": packing, "end_id": 10 if source == "tokens" else -1}
    corpus = load(*paths, **values)
    (first,) = shuffled_sources(corpus, seed=3)
    (again,), (other,) = shuffled_sources(corpus, seed=3), shuffled_sources(corpus, seed=4)
    size = corpus.train.size
    texts, repeated, others = (
        bytes(read_tokens(own.tokens, 0, size).astype(np.uint8)).decode() for own in (first, again, other)
    )
    plain = bytes(np.asarray(corpus.train).astype(np.uint8)).decode()
    assert texts == repeated != others
    assert texts != plain
    # The last document of the training part is cut where the held-out part begins, and has no end.
    assert sorted(texts.replace("\n", "")) == sorted(plain.replace("\n", ""))
    whole = plain.split("\n")[:-1]
    assert all(f"{document}\n" in texts for document in whole)
    assert (first.documents is not None) == (packing == "on")
    if first.documents:
        ends = np.flatnonzero(first.documents.is_last(read_tokens(first.tokens, 0, size), start=0))
        assert {texts[end] for end in ends} <= {"\n", plain[-1]}
        assert len(ends) == len(whole) + (plain[-1] != "\n")


def test_mask_goes_with_its_tokens() -> None:
    (source,) = shuffled_sources(load("ids.npy", source="tokens", end_id=10), seed=1)
    size = source.tokens.size
    assert source.mask is not None
    assert np.array_equal(read_tokens(source.mask, 0, size) == 1, read_tokens(source.tokens, 0, size) == ord("x"))
    batch = Batches((source,), seq_len=8, batch_size=4, microbatches=1, seed=0)[2]
    assert np.array_equal(batch["weights"] > 0, batch["targets"] == ord("x"))


def test_documents_without_ends_cannot_be_shuffled() -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"?": 0}, unk_token="?")).save("tokenizer.json")
    with pytest.raises(DataError, match=r"data\.shuffle='documents' takes the ends of documents, and no file beside"):
        load("*.txt", source="text", tokenizer="tokenizer.json")
    with pytest.raises(DataError, match=r"data\.shuffle='documents' takes the ends of documents, which arrays"):
        load("ids.npy", source="tokens")


@pytest.mark.slow
def test_run_that_is_resumed_has_the_losses_of_one_without_a_pause(tiny: Callable[..., Any]) -> None:
    words = "--data.shuffle documents --data.source text --data.seq_len 16 --data.val_fraction 0.2 --train.steps 4"
    words += " --mesh.data 8 --train.batch_size 8 --optimizer.lr_schedule constant"
    text = [f"{'x' * (i % 31)}{i}\n" for i in range(600)]
    Path("d.jsonl").write_text("".join('{"text": "' + own.strip() + '"}\n' for own in text))
    words += " --data.paths d.jsonl"
    whole = train(tiny(f"{words} --run.name whole"))
    train(tiny(f"{words} --run.name parts --train.steps 2"))
    parts = train(tiny(f"{words} --run.name parts"), changes="accept")
    assert parts.final_train_loss == whole.final_train_loss
