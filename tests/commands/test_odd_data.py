"""Corpora that are broken, endless or named strangely are refused, or read, before they cost anything."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trellax.configs import RunConfig, load_config
from trellax.configs.run_config import DataSection
from trellax.meshes import ConfigError, DataError
from trellax.train import train
from trellax.train.data.corpus import load_corpus

HEADERS = {
    "shape of 2**70": "{'descr': '<u2', 'fortran_order': False, 'shape': (1180591620717411303424,), }",
    "shape of 2**63": "{'descr': '<u2', 'fortran_order': False, 'shape': (9223372036854775808,), }",
    "negative shape": "{'descr': '<u2', 'fortran_order': False, 'shape': (-1,), }",
    "shape that is true": "{'descr': '<u2', 'fortran_order': False, 'shape': True, }",
    "shape of true": "{'descr': '<u2', 'fortran_order': False, 'shape': (True, 2), }",
    "shape of text": "{'descr': '<u2', 'fortran_order': False, 'shape': ('a',), }",
    "longer than the file": "{'descr': '<u2', 'fortran_order': False, 'shape': (1000000,), }",
    "unbalanced": "{'descr': '<u2', 'fortran_order': False, 'shape': ((((((1,), }",
    "open text": "{'descr': '<u2, 'fortran_order': False, 'shape': (1,), }",
    "nested": "(" * 5_000,
    "minus signs": "-" * 9_000 + "1",
    "a list": "[1, 2]",
    "nothing": "",
    "no text": "\x1b[31m\x00",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "unknown type": "{'descr': 'wide', 'fortran_order': False, 'shape': (1,), }",
    "a type of true": "{'descr': True, 'fortran_order': False, 'shape': (1,), }",
    "other byte order": "{'descr': '>u2', 'fortran_order': False, 'shape': (2,), }",
    "a call": "__import__('os').abort()",
}


@pytest.mark.parametrize("name", HEADERS)
def test_array_with_an_odd_header_is_refused_by_name(name: str, tmp_path: Path) -> None:
    header = HEADERS[name].encode("latin-1")
    file = tmp_path / "odd.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64)
    with pytest.raises(DataError, match=r"odd\.npy: (this is no \.npy array|the array is)") as caught:
        load_corpus(DataSection(source="tokens", paths=(str(file),), seq_len=4))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x09\xff\xff", b"PK\x03\x04", b"\0" * 100])
def test_array_that_is_cut_or_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "odd.npy"
    file.write_bytes(content)
    with pytest.raises(DataError):
        load_corpus(DataSection(source="tokens", paths=(str(file),), seq_len=4))


EIGHT = "--mesh.data 8 --train.batch_size 8"


def make_sparse(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.timeout(20)
def test_text_larger_than_memory_is_refused_unread(tmp_path: Path) -> None:
    file = make_sparse(tmp_path / "endless.txt", 20_000_000_000)
    data = DataSection(source="text", paths=(str(file),), seq_len=4)
    with pytest.raises(DataError, match=r"1 file of 20,000,000,000 bytes, the largest .*endless\.txt"):
        load_corpus(data)


def test_folder_whose_name_is_a_pattern_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("run[1]", "run1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(f"{name} " * 100)
    monkeypatch.chdir(tmp_path)
    for paths in ("run[1]/*.txt", str(tmp_path / "run[1]" / "*.txt")):
        corpus = load_corpus(DataSection(source="text", paths=(paths,), seq_len=4))
        assert bytes(np.asarray(corpus.train)[:6]) == b"run[1]"
    corpus = load_corpus(DataSection(source="text", paths=("run[12]/*.txt",), seq_len=4))
    assert bytes(np.asarray(corpus.train)[:4]) == b"run1"


def test_pattern_without_a_match_blames_the_working_directory_only_where_it_matters(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file matches .*\n  Fix: correct data\.paths\."):
        load_corpus(DataSection(source="text", paths=(str(tmp_path / "*.txt"),), seq_len=4))


def test_wrong_vocabulary_and_missing_corpus_are_reported_together(tiny: Callable[..., RunConfig]) -> None:
    config = tiny(f"{EIGHT} --model.vocab_size 100 --data.paths nowhere/*.txt --optimizer.warmup_steps 1000")
    with pytest.raises(ConfigError) as caught:
        train(config)
    for word in ("3 things do not fit", "model.vocab_size=100", "'nowhere/*.txt'", "optimizer.warmup_steps=1000"):
        assert word in str(caught.value)
    assert not config.run_folder.exists()


def test_run_without_its_corpus_is_described_all_the_same(tiny: Callable[..., RunConfig]) -> None:
    from trellax.train.prepare import prepare

    assert prepare(tiny(f"{EIGHT} --data.paths nowhere.txt")).config.train.batch_size == 8
    assert load_config("gpt2-124m").data.source == "tokens"
