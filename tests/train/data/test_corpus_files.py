"""Files that are not plain text, or hold token ids of another type, are refused before a run trains on them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError
from trellax.train.data.corpus import load_corpus

Golden = Callable[[str, str], None]
IDS = np.random.default_rng(0).integers(0, 50_000, 4_000)
LARGE_IDS = np.random.default_rng(1).integers(0, 128_000, 4_000)
TEXT = b"Once upon a time there was a mesh.\n" * 20


def load(paths: list[str], **values: Any) -> np.ndarray:
    section = {"source": "text", "seq_len": 8, "val_fraction": 0.25, "paths": tuple(paths)} | values
    corpus = load_corpus(DataSection.model_validate(section))
    return np.concatenate([corpus.train, corpus.validation])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "records.json").write_text('{"text": "a story"}\n' * 40)
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT, mtime=0))
    (tmp_path / "hidden.txt").write_bytes(gzip.compress(bytes(range(200)), mtime=0))
    (tmp_path / "wide.txt").write_bytes(TEXT.decode().encode("utf-16"))
    IDS.astype(np.uint32).tofile(tmp_path / "ids.bin")
    LARGE_IDS.astype(np.uint32).tofile(tmp_path / "large.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, IDS.size
    (tmp_path / "llm.bin").write_bytes(header.tobytes() + IDS.astype(np.uint16).tobytes())
    np.save(tmp_path / "array.npy", IDS)
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    IDS.astype(np.int32).tofile(tmp_path / "megatron.bin")
    (tmp_path / "megatron.idx").write_bytes(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([4]))
    IDS.astype(np.uint16).tofile(tmp_path / "said.bin")
    (tmp_path / "said.json").write_text(json.dumps({"dtype": "uint32"}))
    return tmp_path


MISTAKES: dict[str, dict[str, Any]] = {
    "records": {"paths": ["records.json"]},
    "text_in_gzip": {"paths": ["*.gz"]},
    "compressed_text": {"paths": ["hidden.txt"]},
    "utf16": {"paths": ["wide.txt"]},
    "named_twice": {"paths": ["a.txt", "./a.txt"]},
    "uint32_read_as_uint16": {"paths": ["ids.bin"], "source": "tokens"},
    "large_uint32_read_as_uint16": {"paths": ["large.bin"], "source": "tokens"},
    "header": {"paths": ["llm.bin"], "source": "tokens"},
    "npy_named_bin": {"paths": ["array.bin"], "source": "tokens"},
    "megatron_index": {"paths": ["megatron.bin"], "source": "tokens"},
    "sidecar": {"paths": ["said.bin"], "source": "tokens"},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_file_of_another_kind_is_refused(name: str, folder: Path, golden: Golden) -> None:
    with pytest.raises(DataError) as caught:
        load(**MISTAKES[name])
    golden(f"errors/train/corpus_{name}.txt", str(caught.value))


@pytest.mark.parametrize("file", ["ids.bin", "large.bin", "megatron.bin"])
def test_ids_of_32_bits_are_read_where_the_config_says_so(file: str, folder: Path) -> None:
    wanted = LARGE_IDS if file == "large.bin" else IDS
    assert (load([file], source="tokens", token_dtype="uint32") == wanted).all()


@pytest.mark.parametrize("ids", [IDS, IDS % 300, IDS % 5, np.arange(4_000) % 9])
def test_16_bit_ids_are_never_taken_for_wider_ones(ids: np.ndarray, tmp_path: Path) -> None:
    ids.astype(np.uint16).tofile(tmp_path / "ids.bin")
    assert (load([str(tmp_path / "ids.bin")], source="tokens") == ids).all()


def test_documents_are_joined_by_a_line_break_where_they_end_without_one(folder: Path) -> None:
    for name, text in (("1.txt", "one"), ("2.txt", "two\n"), ("3.txt", ""), ("4.txt", "three, and the end.")):
        (folder / name).write_text(text)
    assert load(["[1-4].txt"], val_fraction=0.4).tobytes() == b"one\ntwo\nthree, and the end."


def test_files_that_two_globs_match_are_read_once(folder: Path) -> None:
    assert load(["a.*", "*a.txt"]).tobytes() == TEXT


ODD: dict[str, tuple[bytes, str]] = {
    "records named text": (b'{"text": "a story"}\n' * 40, "its lines are JSON records"),
    "ids read as text": (IDS.astype(np.uint16).tobytes(), "null bytes"),
    "UTF-16 without its mark": (TEXT.decode().encode("utf-16-le"), "null bytes"),
}


@pytest.mark.parametrize("name", ODD)
def test_content_of_text_is_checked_and_not_only_its_name(name: str, tmp_path: Path) -> None:
    content, problem = ODD[name]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=problem):
        load([str(tmp_path / "a.txt")])


def test_byte_order_mark_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + TEXT)
    assert load([str(tmp_path / "a.txt")]).tobytes() == TEXT


@pytest.mark.parametrize("read", ["uint16", "uint32"])
@pytest.mark.parametrize("ids", [IDS, IDS % 6], ids=["words", "letters"])
@pytest.mark.parametrize("written", ["<u4", ">u4", "<i8", ">i8"])
def test_wider_ids_are_not_read_as_narrow_ones(ids: np.ndarray, written: str, read: str, tmp_path: Path) -> None:
    # Padding before them, longer than what was looked at.
    padded = np.concatenate([np.zeros(1 << 20, np.int64), ids])
    padded.astype(written).tofile(tmp_path / "ids.bin")
    if np.dtype(written).itemsize == 4 and read == "uint32":
        assert load([str(tmp_path / "ids.bin")], source="tokens", token_dtype=read).size == padded.size
    else:
        with pytest.raises(DataError, match="look like uint"):
            load([str(tmp_path / "ids.bin")], source="tokens", token_dtype=read)


def test_text_is_not_read_as_ids(tmp_path: Path) -> None:
    (tmp_path / "ids.bin").write_bytes(TEXT)
    with pytest.raises(DataError, match="no raw array of token ids, but text"):
        load([str(tmp_path / "ids.bin")], source="tokens")


@pytest.mark.parametrize("said", ["<u4", "np.uint32", "float32", ">u2"])
def test_sidecar_says_its_type_in_any_of_numpys_ways(said: str, tmp_path: Path) -> None:
    IDS.astype(np.uint16).tofile(tmp_path / "said.bin")
    (tmp_path / "said.json").write_text(json.dumps({"dtype": said}))
    with pytest.raises(DataError, match=r"said\.json says"):
        load([str(tmp_path / "said.bin")], source="tokens")


def test_arrays_of_signed_and_unsigned_ids_are_joined_as_whole_numbers(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IDS)
    np.save(tmp_path / "b.npy", IDS.astype(np.uint64))
    joined = load([str(tmp_path / "a.npy"), str(tmp_path / "b.npy")], source="tokens")
    assert joined.dtype.kind == "i"
    assert (joined == np.tile(IDS, 2)).all()
