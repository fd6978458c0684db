"""Documents become ids of a model's own tokenizer, each with its end; a second run reads the ids that were kept."""

import json
import os
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from trellax.configs.run_config import DataSection
from trellax.hub import tokenized_text as module
from trellax.hub.tokenized_text import tokenize
from trellax.hub.tokenizer import load_tokenizer
from trellax.hub.tokenizer_files import keep_tokenizer
from trellax.meshes import DataError
from trellax.train.data.corpus import load_corpus

TEXTS = ["the cat sat on the mat\n" * 20, "a cat is a cat, é 猫\n" * 20]
VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 300 ids, whose id 0 ends a document."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=["<end>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(5)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two texts, to work in."""
    monkeypatch.chdir(tmp_path)
    for name, text in zip(("a.txt", "b.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text)
    return tmp_path


def section(source: Path | str, **changes: Any) -> DataSection:
    values: dict[str, Any] = {"source": "text", "paths": ("*.txt",), "seq_len": 8, "tokenizer": str(source)}
    return DataSection(**(values | changes))


def test_truncation_of_the_tokenizer_is_ignored(source: Path) -> None:
    tokenizer = load_tokenizer(source)
    assert len(tokenizer.encode(TEXTS[1])) > 5
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS


def test_corpus_is_every_document_with_its_end(source: Path, here: Path) -> None:
    tokenizer = load_tokenizer(source)
    corpus = load_corpus(section(source))
    expected = [*tokenizer.encode(TEXTS[0]), 0, *tokenizer.encode(TEXTS[1]), 0]
    assert [*np.asarray(corpus.train), *np.asarray(corpus.validation)] == expected
    assert corpus.train.dtype == np.uint16
    assert corpus.vocab_size_needed <= VOCAB_SIZE


@pytest.mark.parametrize(
    ("name", "values", "end"),
    [
        ("tokenizer_config.json", {"eos_token": "<end>"}, 0),
        ("tokenizer_config.json", {"eos_token": "<other>"}, None),
        ("config.json", {"eos_token_id": 3}, 3),
        ("generation_config.json", {"eos_token_id": [5, 3]}, 5),
        ("config.json", {}, None),
        ("config.json", {"eos_token_id": -1}, None),
        ("config.json", {"eos_token_id": 70_000}, None),
    ],
)
def test_end_of_a_document_is_what_the_model_says(
    name: str, values: dict[str, Any], end: int | None, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.special.end_id == end
    ids = tokenize([("one", b"cat"), ("two", b"mat")], tokenizer, cache=None)
    assert list(ids).count(end) == (2 if end is not None else 0)


@pytest.mark.parametrize("token", ["\ud800", {"content": "a\udfff"}])
def test_half_a_character_ends_no_document(token: object, source: Path) -> None:
    (source / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    assert load_tokenizer(source).special.end_id is None


def test_texts_that_end_an_answer_are_all_that_the_model_names(source: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0, 3, True, "7"]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert load_tokenizer(tmp_path).special.stop_ids == (5, 0, 3)


@pytest.fixture
def llama(source: Path, tmp_path: Path) -> Path:
    """The same tokenizer, which begins and ends a text with a token, as Llama's does with the first."""
    tokenizer: Any = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.add_special_tokens(["<begin>"])
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<begin>", "<end>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=ids)
    (tmp_path / "llama").mkdir()
    tokenizer.save(str(tmp_path / "llama" / "tokenizer.json"))
    (tmp_path / "llama" / "config.json").write_text('{"eos_token_id": 0}')
    return tmp_path / "llama"


def test_texts_begin_as_those_that_the_model_was_trained_on(llama: Path) -> None:
    tokenizer = load_tokenizer(llama)
    cat, begin = tokenizer.encode("cat"), tokenizer.tokenizer.token_to_id("<begin>")
    assert tokenizer.encode_prompt("cat") == [begin, *cat]
    assert begin not in cat
    assert tokenizer.encode_prompt("cat<end>") == [begin, *cat, 0]  # written by the user
    assert tokenizer.encode_prompt("") == [begin]
    assert tokenize([("one", b"cat")], tokenizer, cache=None).tolist() == [begin, *cat, 0]


def test_tokenizer_of_any_name_is_copied_into_the_run_folder_over_an_older_one(
    source: Path, llama: Path, tmp_path: Path
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    keep_tokenizer(str(source), run)
    shutil.copytree(source, other)
    (llama / "tokenizer.json").rename(other / "mine.json")
    keep_tokenizer(str(other / "mine.json"), run)
    assert (run / "tokenizer.json").read_bytes() == (other / "mine.json").read_bytes()
    keep_tokenizer(str(run), run)


def test_text_that_a_tokenizer_has_no_token_for_is_reported(tmp_path: Path, golden: Callable[[str, str], None]) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path).encode_prompt("b")
    golden("errors/hub/tokenizer_no_token.txt", str(caught.value).replace(str(tmp_path), "model"))


def test_kept_tokens_are_read_and_other_text_is_tokenized_anew(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_corpus(section(source), cache=here / "run")
    encode, calls = module._encode, []
    monkeypatch.setattr(module, "_encode", lambda *args: calls.append(1) or encode(*args))
    again = load_corpus(section(source), cache=here / "run")
    assert (again.sha256, calls) == (first.sha256, [])
    (here / "b.txt").write_text("another cat\n" * 20)
    assert load_corpus(section(source), cache=here / "run").sha256 != first.sha256
    assert calls == [1]


def test_processes_of_one_id_on_two_machines_keep_tokens_at_once(
    source: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, machines = module._encode, iter(["other", "done"])

    def encode_beside_another(*args: Any) -> np.ndarray:
        monkeypatch.setattr(socket, "gethostname", lambda: "other")
        if next(machines) == "other":
            # Another process comes by while this one has its file open, and is done first.
            load_corpus(section(source), cache=here / "run")
        return encode(*args)

    monkeypatch.setattr(module, "_encode", encode_beside_another)
    assert load_corpus(section(source), cache=here / "run").train.size > 0


def test_standard_library_is_text_that_a_tokenizer_reads(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(documents: Any, *_: Any) -> np.ndarray:
        return np.arange(sum(map(len, module._batches(documents))), dtype=np.uint16)

    # Merging ten million bytes takes seconds; that they are text is what matters.
    monkeypatch.setattr(module, "_encode", count)
    corpus = load_corpus(DataSection(seq_len=8, tokenizer=str(source)))
    assert corpus.train.size > 300
    assert "standard library" in corpus.description


MISTAKES: dict[str, dict[str, Any]] = {
    "missing": {"tokenizer": "nowhere"},
    "folder_without": {"tokenizer": "."},
    "no_tokenizer": {"tokenizer": "a.txt"},
    "no_utf8": {"paths": ("latin.txt",)},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_says_how_to_fix_it(name: str, source: Path, here: Path, golden: Callable[[str, str], None]) -> None:
    Path("latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(DataError) as caught:
        load_corpus(section(source, **MISTAKES[name]))
    golden(f"errors/hub/tokenizer_{name}.txt", str(caught.value))


def test_ids_that_a_model_lacks_are_refused_where_they_occur(
    source: Path, here: Path, golden: Callable[[str, str], None]
) -> None:
    tokenizer: Any = Tokenizer.from_file(str(source / "tokenizer.json"))
    size = tokenizer.get_vocab_size()
    # Many models came with a tokenizer that has a pad token behind their last id.
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save("tokenizer.json")
    assert load_corpus(section("tokenizer.json"), vocab_size=size, cache=here).vocab_size_needed <= size
    Path("b.txt").write_text("a cat <pad>")
    with pytest.raises(DataError) as caught:
        load_corpus(section("tokenizer.json"), vocab_size=size, cache=here)
    golden("errors/hub/tokenizer_too_large.txt", str(caught.value))


PANICS: dict[str, dict[str, Any]] = {
    "merge of unknown parts": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    "no special token": {"post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}},
    "no charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
    "no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "strips more than there is": {"decoder": {"type": "Strip", "content": "a", "start": 9, "stop": 9}},
}
PANICS["no special token"]["post_processor"]["single"] = [{"SpecialToken": {"id": "[X]", "type_id": 0}}]


@pytest.mark.parametrize("name", PANICS)
def test_tokenizer_that_panics_gives_an_error_of_one_sentence(
    name: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    Path("tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model} | PANICS[name]))
    with pytest.raises(DataError, match=r"^tokenizer\.json is no tokenizer: "):
        load_tokenizer("tokenizer.json")
    assert capfd.readouterr().err == ""


def test_threads_that_decode_at_once_leave_stderr_as_it_was(source: Path) -> None:
    tokenizer, before = load_tokenizer(source), os.fstat(2)
    ids = tokenizer.encode(TEXTS[1] * 5)
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(tokenizer.decode, [ids] * 200)) == {TEXTS[1] * 5}
        assert set(map(tuple, pool.map(tokenizer.encode, [TEXTS[1] * 5] * 200))) == {tuple(ids)}
    assert os.path.samestat(os.fstat(2), before)
