"""Corpora are read whole, hashed, cut the same way every time, or refused with the numbers."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError
from trellax.train.data.corpus import check_vocabulary, load_corpus

Golden = Callable[[str, str], None]


def section(**values: Any) -> DataSection:
    return DataSection.model_validate({"source": "text", "seq_len": 8, "val_fraction": 0.25} | values)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(bytes(range(20, 80)))
    (tmp_path / "b.txt").write_bytes(bytes(range(80, 120)))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "short.txt").write_bytes(b"twenty letters, say.")
    (tmp_path / "odd.bin").write_bytes(bytes(7))
    np.save(tmp_path / "square.npy", np.zeros((4, 4), np.uint16))
    np.save(tmp_path / "float.npy", np.zeros(99))
    np.save(tmp_path / "negative.npy", np.full(99, -1))
    (tmp_path / "fake.npy").write_bytes(b"no array")
    return tmp_path


MISTAKES: dict[str, dict[str, Any]] = {
    "missing_file": {"paths": ("c.txt",)},
    "glob_without_match": {"paths": ("nothing/*.txt",)},
    "folder": {"paths": (".",)},
    "no_paths": {"paths": ()},
    "empty_corpus": {"paths": ("empty.txt",)},
    "empty_tokens": {"paths": ("empty.txt",), "source": "tokens"},
    "too_short": {"paths": ("short.txt",)},
    "odd_bytes": {"paths": ("odd.bin",), "source": "tokens"},
    "two_dimensions": {"paths": ("square.npy",), "source": "tokens"},
    "fractions": {"paths": ("float.npy",), "source": "tokens"},
    "negative_ids": {"paths": ("negative.npy",), "source": "tokens"},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_corpus_that_cannot_be_read_is_refused(name: str, folder: Path, golden: Golden) -> None:
    with pytest.raises(DataError) as caught:
        load_corpus(section(**MISTAKES[name]))
    golden(f"errors/train/data_{name}.txt", str(caught.value))


@pytest.mark.parametrize("name", ["fake.npy", "many.npy", "zip.npy"])
def test_file_that_is_no_array_is_refused(name: str, folder: Path) -> None:
    np.savez(folder / "many.npz", np.arange(99, dtype=np.uint16))
    (folder / "many.npz").rename(folder / "many.npy")
    (folder / "zip.npy").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match=f"{name}: this is no .npy array"):
        load_corpus(section(paths=(name,), source="tokens"))


def test_text_is_its_bytes_in_order_with_the_tail_held_out(folder: Path) -> None:
    corpus = load_corpus(section(paths=("[ab].txt",)))
    wanted = bytes(range(20, 80)) + b"\n" + bytes(range(80, 120))
    assert np.asarray(corpus.train).tobytes() == wanted[:76]
    assert np.asarray(corpus.validation).tobytes() == wanted[76:]
    assert corpus.sha256 == hashlib.sha256(wanted).hexdigest()
    assert corpus.vocab_size_needed == 256
    assert corpus.description == "bytes of 2 text files, 101 tokens, 25 held out"


def test_file_that_a_glob_matches_too_is_read_once(folder: Path) -> None:
    assert load_corpus(section(paths=("a.txt", "[a].txt"))).train.size == 45


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_tokens_are_mapped_from_disk(dtype: str, folder: Path) -> None:
    np.arange(1000, 1100, dtype=dtype).tofile("t.bin")
    corpus = load_corpus(section(paths=("t.bin",), source="tokens", token_dtype=dtype))
    assert isinstance(corpus.train, np.memmap)
    assert np.asarray(corpus.validation).tolist() == list(range(1075, 1100))
    assert corpus.vocab_size_needed == 1100


def test_saved_arrays_keep_their_own_type(folder: Path) -> None:
    np.save("t.npy", np.arange(70_000, 70_100, dtype=np.uint32))
    assert np.asarray(load_corpus(section(paths=("t.npy",), source="tokens")).train)[0] == 70_000


def test_token_above_the_vocabulary_is_refused(folder: Path, golden: Golden) -> None:
    np.arange(100, dtype=np.uint16).tofile("t.bin")
    corpus = load_corpus(section(paths=("t.bin",), source="tokens"))
    check_vocabulary(corpus, vocab_size=100)
    with pytest.raises(DataError) as caught:
        check_vocabulary(corpus, vocab_size=99)
    golden("errors/train/data_token_above_vocabulary.txt", str(caught.value))


def test_standard_library_is_a_large_corpus_on_every_machine() -> None:
    corpus = load_corpus(DataSection(seq_len=128))
    assert corpus.train.size > 5_000_000
    assert corpus.validation.size == round((corpus.train.size + corpus.validation.size) * 0.05)
    assert b"def " in np.asarray(corpus.validation).tobytes()
    assert corpus.sha256 == load_corpus(DataSection(seq_len=128)).sha256
