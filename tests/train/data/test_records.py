"""Records of every format give the same documents; damaged ones are named, and refused past a share."""

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
TEXTS = [f"document {i}: {'ä' * (i % 7)} \U0001f600 of {i * i}\n" for i in range(40)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def load(*paths: str, **values: Any) -> Any:
    section = {"source": "text", "seq_len": 8, "val_fraction": 0.25, "paths": paths} | values
    return load_corpus(DataSection.model_validate(section))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(TEXTS):
        Path(f"{i:02}.txt").write_bytes(text.encode())
    Path("a.jsonl").write_bytes(LINES)
    return tmp_path


def write_table(file: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"text": TEXTS, "id": list(range(len(TEXTS)))})
    if file.endswith(".parquet"):
        parquet.write_table(table, file, row_group_size=7)
        return
    new = arrow.ipc.new_stream if file.startswith("stream") else arrow.ipc.new_file
    with arrow.OSFile(file, "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=9)


def write_frames(file: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.ZstdCompressor().compress(part) for part in (LINES[:700], LINES[700:])]
    Path(file).write_bytes(b"".join(frames))


FORMATS: dict[str, Callable[[str], object]] = {
    "b.jsonl": lambda file: Path(file).write_bytes(b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
    "b.jsonl.gz": lambda file: Path(file).write_bytes(gzip.compress(LINES)),
    "b.ndjson.zst": write_frames,
    "b.parquet": write_table,
    "file.arrow": write_table,
    "stream.arrow": write_table,
}


@pytest.mark.parametrize("file", FORMATS)
def test_every_format_gives_the_tokens_of_text_files(file: str) -> None:
    FORMATS[file](file)
    corpus, texts = load(file), load("*.txt")
    assert corpus.sha256 == texts.sha256
    assert corpus.description.startswith("bytes of 40 documents in 1 file, ")
    packed, apart = load(file, packing="on").documents, load("*.txt", packing="on").documents
    assert packed.ends.tolist() == apart.ends.tolist()


def test_field_is_found_by_its_name() -> None:
    Path("b.jsonl").write_bytes(LINES.replace(b'"text"', b'"content"'))
    assert load("b.jsonl", text_field="content").sha256 == load("a.jsonl").sha256


def test_folder_of_datasets_is_read_in_the_order_of_its_files() -> None:
    for name in ("stream-b.arrow", "stream-a.arrow"):
        write_table(name)
    files = [{"filename": "stream-b.arrow"}, {"filename": "stream-a.arrow"}]
    Path("state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    assert load(".").sha256 == load("stream-b.arrow", "stream-a.arrow").sha256


def test_few_damaged_lines_are_counted_and_named() -> None:
    Path("b.jsonl").write_bytes(LINES * 30 + b'{"text": "cut o')
    corpus = load("b.jsonl")
    assert corpus.train.size + corpus.validation.size == len("".join(TEXTS * 30).encode())
    assert "1 of 1,201 records damaged and left out (b.jsonl:1201: no JSON: Unterminated string" in corpus.description


MISTAKES: dict[str, Callable[[], object]] = {
    "many_damaged": lambda: Path("b.jsonl").write_bytes(
        LINES + b'{"text": "cut o\n[1, 2]\n{"text": 7}\n{"no": 1}\n{"text": "\\ud800"}\n{}\n{\n'
    ),
    "no_such_field": lambda: Path("b.jsonl").write_bytes(b'{"tekst": "a", "id": 3}\n' * 9),
    "cut_off_gzip": lambda: Path("b.jsonl.gz").write_bytes(gzip.compress(LINES, mtime=0)[:-90]),
    "no_records": lambda: Path("b.jsonl").write_bytes(b"\n\n"),
    "splits": lambda: Path("b").mkdir() or Path("b/dataset_dict.json").write_text('{"splits": ["train", "test"]}'),
    "indices": lambda: (
        Path("b").mkdir()
        or Path("b/state.json").write_text('{"_data_files": [], "_indices_files": [{"filename": "i.arrow"}]}')
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_records_that_cannot_be_read_are_refused(name: str, golden: Golden) -> None:
    MISTAKES[name]()
    with pytest.raises(DataError) as caught:
        load("b" if Path("b").exists() else "b.jsonl*")
    golden(f"errors/train/records_{name}.txt", str(caught.value))


def test_cut_off_zstandard_is_refused() -> None:
    write_frames("b.jsonl.zst")
    Path("b.jsonl.zst").write_bytes(Path("b.jsonl.zst").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"b\.jsonl\.zst: it cannot be unpacked to its end: the last frame is cut off"):
        load("b.jsonl.zst")


def test_column_that_holds_no_text_is_refused() -> None:
    write_table("b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: the column id is int64, no text"):
        load("b.parquet", text_field="id")
    with pytest.raises(DataError, match=r"there is no field 'txt'; the fields are 'text', 'id'\. Did you mean 'text'"):
        load("b.parquet", text_field="txt")
    Path("c.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"c\.parquet: this is no parquet file"):
        load("c.parquet")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("trellax.train.data.records.extra.import_module", fail)
    Path("b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs the package pyarrow") as caught:
        load("b.parquet")
    assert caught.value.fix == "pip install 'trellax[data]'."


def test_arrays_of_tokens_hold_those_of_texts() -> None:
    corpus = load("a.jsonl")
    np.save("ids.npy", np.concatenate([corpus.train, corpus.validation]))
    assert load("ids.npy", source="tokens").sha256 == corpus.sha256
