"""A corpus that was prepared gives the tokens of its texts, however it is cut, and goes on where it was stopped."""

import gzip
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.configs.check import check_run
from trellax.configs.run_config import DataSection
from trellax.meshes import DataError
from trellax.train import train
from trellax.train.data.corpus import load_corpus
from trellax.train.data.records.damage import Damage
from trellax.train.data.shards.prepare_tokens import prepare_tokens
from trellax.train.data.shards.train_tokenizer import train_tokenizer

PEAKS = """
import resource, sys
from trellax.commands.cli import main
code = main()
# Not ru_maxrss of this process, which it inherits from the one that started it.
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""
"""Runs the command, and prints the peaks of its own memory and of its largest process, in KiB."""

Golden = Callable[[str, str], None]
TEXTS = [f"document {i}: {'ä' * (i % 7)} \U0001f600 of {i * i}\n" * (1 + i % 3) for i in range(60)]
LINES = [json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(TEXTS)]


def load(*paths: str, **values: Any) -> Any:
    section = {"source": "text", "seq_len": 8, "val_fraction": 0.25, "paths": paths} | values
    return load_corpus(DataSection.model_validate(section))


def prepare(*files: str, out: str, **options: Any) -> dict[str, Any]:
    return prepare_tokens([Path(file) for file in files], out=Path(out), **options)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_bytes(b"".join(LINES[:30]))
    Path("b.jsonl.gz").write_bytes(gzip.compress(b"".join(LINES[30:40])))
    for i in range(40, 60):
        Path(f"{i}.txt").write_bytes(TEXTS[i].encode())
    Path("all.jsonl").write_bytes(b"".join(LINES))
    Path("tokenizer").mkdir()
    train_tokenizer([Path("all.jsonl")], out=Path("tokenizer"), vocab_size=300, field="text", damage=Damage())
    return tmp_path


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shard_bytes=st.integers(20, 6_000), tokenizer=st.sampled_from(["bytes", "tokenizer"]))
def test_shards_of_any_size_hold_the_tokens_of_the_texts(
    shard_bytes: int, tokenizer: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = ["a.jsonl", "b.jsonl.gz", *(f"{i}.txt" for i in range(40, 60))]
    out = str(tmp_path_factory.mktemp("out"))
    index = prepare(*files, out=out, tokenizer=tokenizer, shard_bytes=shard_bytes)
    ours, theirs = load(out, source="tokens", packing="on"), load(*files, tokenizer=tokenizer, packing="on")
    assert (index["num_documents"], ours.sha256) == (60, theirs.sha256)
    tokens = np.asarray(ours.train)
    first, second = (own.documents.is_last(tokens, start=0).tolist() for own in (ours, theirs))
    assert first == second
    assert ours.train.size + ours.validation.size == index["num_tokens"]
    assert index["vocab_size_needed"] <= 300


def test_processes_write_the_same_folder_as_one(folder: Path) -> None:
    one = prepare("all.jsonl", out="one", tokenizer="tokenizer", shard_bytes=900)
    two = prepare("all.jsonl", out="two", tokenizer="tokenizer", shard_bytes=900, num_processes=2)
    assert one == two
    assert len(one["shards"]) > 5
    assert sorted(file.name for file in Path("one").iterdir()) == sorted(file.name for file in Path("two").iterdir())


def test_stopped_command_goes_on_with_the_shards_that_are_left() -> None:
    whole = prepare("all.jsonl", out="whole", shard_bytes=700)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare("all.jsonl", out="out", shard_bytes=700, report=stop)
    with pytest.raises(DataError, match="'out' is not finished"):
        load("out", source="tokens")
    before = {file: file.stat().st_mtime_ns for file in Path("out").glob("tokens-*.npy")}
    reports: list[int] = []
    assert prepare("all.jsonl", out="out", shard_bytes=700, report=lambda done, _: reports.append(done)) == whole
    assert reports[0] > 0
    assert len(before) > 2
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert sorted(file.name for file in Path("out").iterdir()) == sorted(file.name for file in Path("whole").iterdir())
    assert prepare("all.jsonl", out="out", shard_bytes=700) == whole


CHILDREN = """
import sys
from pathlib import Path
from trellax.train.data.shards.prepare_tokens import prepare_tokens

def told(done, total):
    print(*Path(f"/proc/self/task/{Path('/proc/thread-self').resolve().name}/children").read_text().split(), flush=True)
    sys.stdin.read()

if __name__ == "__main__":
    prepare_tokens([Path("all.jsonl")], out=Path("out"), shard_bytes=500, num_processes=2, report=told)
"""
"""Prints its processes after the first shard, and waits."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/thread-self").exists(), reason="lists processes as Linux does")
def test_processes_end_with_a_command_that_is_killed() -> None:
    Path("run.py").write_text(CHILDREN)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "run.py"], **pipes) as command:
        assert command.stdout is not None
        children = command.stdout.readline().split()
        assert len(children) >= 2
        command.kill()
    end_s = time.monotonic() + 20
    while left := [one for one in children if Path(f"/proc/{one}").exists()]:
        assert time.monotonic() < end_s, left
        time.sleep(0.1)


def test_damaged_lines_of_any_shard_are_named_by_their_number() -> None:
    lines = [*LINES]
    lines[7], lines[40] = b'{"text": "cut o\n', b"\xff\n"
    Path("c.jsonl").write_bytes(b"".join(lines))
    index = prepare("c.jsonl", out="out", shard_bytes=500, max_damaged=0.1)
    assert [place.partition(": ")[0] for place in index["damaged"]] == ["c.jsonl:8", "c.jsonl:41"]
    assert (index["num_damaged"], index["num_documents"]) == (2, 58)
    with pytest.raises(DataError, match=r"1 of 10 records are damaged, more than 0\.1%:\n  c\.jsonl:8: no JSON"):
        prepare("c.jsonl", out="strict", shard_bytes=500)


def make_prepared(change: Callable[[Path], object]) -> Callable[[], Any]:
    def make() -> Any:
        prepare("all.jsonl", out="out", shard_bytes=900)
        change(Path("out"))
        return load("out", source="tokens", packing="on")

    return make


def swap_tokens(out: Path) -> None:
    tokens = np.load(out / "tokens-00001.npy")
    tokens[3] += 1
    np.save(out / "tokens-00001.npy", tokens)


MISTAKES: dict[str, Callable[[], Any]] = {
    "other_tokens": lambda: [prepare("all.jsonl", out="out"), prepare("a.jsonl", out="out", field="id")],
    "other_folder": lambda: prepare("a.jsonl", out="tokenizer"),
    "changed_shard": make_prepared(swap_tokens),
    "broken_documents": make_prepared(lambda out: (out / "documents-00001.npy").write_bytes(b"")),
    "lost_shard": make_prepared(lambda out: (out / "tokens-00001.npy").unlink()),
    "broken_index": make_prepared(lambda out: (out / "index.json").write_text('{"format": "trellax tokens 1"}')),
    "no_utf8": lambda: [Path("x.txt").write_bytes(b"ab\xff"), prepare("x.txt", out="out", tokenizer="tokenizer")],
    "small_vocabulary": lambda: train_tokenizer(
        [Path("a.jsonl")], out=Path("tokenizer"), vocab_size=256, field="text", damage=Damage()
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str, golden: Golden) -> None:
    with pytest.raises(DataError) as caught:
        MISTAKES[name]()
    golden(f"errors/train/shards_{name}.txt", str(caught.value))


def test_packing_of_a_prepared_folder_needs_no_end_id() -> None:
    words = "--data.source tokens --data.packing on --data.paths "
    prepare("all.jsonl", out="out")
    check_run(load_config("tiny-llama", words + "out"), num_devices=1, corpus="needed")


def test_command_prepares_and_trains_a_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "train-tokenizer", "*.jsonl", "--vocab-size", "280", "--out", "bpe"]) == 0
    assert capsys.readouterr().out.startswith("280 tokens in ")
    assert main(["data", "prepare", "all.jsonl", "--tokenizer", "bpe", "--out", "out", "--processes", "1"]) == 0
    printed = capsys.readouterr()
    assert " tokens of 60 documents in " in printed.out
    assert "out: 1 shards, sha256 " in printed.out
    assert printed.err.splitlines()[-1] == "0.0077 of 0.0077 MB"
    assert load("out", source="tokens").sha256 == load("all.jsonl", tokenizer="bpe").sha256
    assert main(["data", "prepare", "all.jsonl", "--tokenizer", "bpe", "--out", "out", "--processes=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_documents"] == 60


def test_tokens_are_not_read_as_texts(capsys: pytest.CaptureFixture[str]) -> None:
    prepare("all.jsonl", out="shards")
    Path("texts").mkdir()
    Path("texts/index.json").write_text("{}")
    assert main(["data", "prepare", "texts", "--out", "of-texts"]) == 2
    assert "DataError: SOURCE: 'texts' is a folder." in capsys.readouterr().err
    assert main(["data", "prepare", "shards", "--out", "again"]) == 2
    assert "DataError: SOURCE: shards holds the tokens that `trellax data prepare` made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prepare", "none.jsonl", "--out", "x"], "'none.jsonl' does not exist"),
        (["prepare", "all.jsonl", "--out", "x", "--shard-mib", "0"], "--shard-mib 0 is out of range"),
        (["prepare", "all.jsonl", "--out", "x", "--max-damaged", "nan"], "--max-damaged nan is out of range"),
        (["prepare", "all.jsonl", "--out", "x", "--text-field", "tekst"], "there is no field 'tekst'"),
        (["prepare", "all.jsonl", "--out", "all.jsonl/x"], "cannot be used: "),
        (["train-tokenizer", "all.jsonl", "--out", "tokenizer", "--vocab-size", "999"], "tokenizer is already there"),
        (["train-tokenizer", "all.jsonl", "--out", "x"], "needs --vocab-size"),
        (
            ["train-tokenizer", "all.jsonl", "--out", "x", "--processes", "2"],
            "--processes is for `trellax data prepare`",
        ),
        (["prepare", "all.jsonl", "--out", "x", "--vocab-size", "999"], "--vocab-size is for"),
        (["prepar", "all.jsonl", "--out", "x"], "Did you mean 'prepare'"),
        ([], "the following arguments are required: ACTION"),
    ],
)
def test_command_that_cannot_work_says_why(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words]) == 2
    assert message in capsys.readouterr().err


def write_formats() -> dict[str, str]:
    """Write the documents in every format that is read, and return the words of a config for each."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    zstandard, lines = pytest.importorskip("zstandard"), b"".join(LINES)
    table = arrow.table({"text": TEXTS})
    parquet.write_table(table, "all.parquet", row_group_size=7)
    Path("all.jsonl.gz").write_bytes(gzip.compress(lines))
    Path("all.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    for file in ("all.arrow", "folder/data-00000-of-00001.arrow"):
        Path(file).parent.mkdir(exist_ok=True)
        with arrow.OSFile(file, "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"}
    Path("folder/state.json").write_text(json.dumps(state))
    Path("texts").mkdir()
    for i, text in enumerate(TEXTS):
        Path(f"texts/{i:02}.txt").write_text(text)
    np.save("all.npy", np.frombuffer("".join(TEXTS).encode(), np.uint8))
    paths = ("all.jsonl", "all.jsonl.gz", "all.jsonl.zst", "all.parquet", "all.arrow", "folder", "texts/*.txt")
    mixed = "a.jsonl,b.jsonl.gz,[45]?.txt"
    texts = {path: f"text --data.paths {path}" for path in (*paths, mixed)}
    return texts | {path: f"tokens --data.paths {path}" for path in ("all.npy", "shards", "shards-of-parquet")}


@pytest.mark.slow
def test_losses_are_bitwise_those_of_every_format(tiny: Callable[..., Any]) -> None:
    formats = write_formats()
    prepare("all.jsonl", out="shards", shard_bytes=900)
    prepare("all.parquet", out="shards-of-parquet")
    words = "--mesh.data 8 --train.batch_size 8 --train.steps 3 --data.seq_len 16 --data.val_fraction 0.2"
    losses = {}
    for i, (path, source) in enumerate(formats.items()):
        summary = train(tiny(f"{words} --run.name run-{i} --data.source {source}"))
        losses[path] = (summary.final_train_loss, summary.final_val_loss)
    assert losses == dict.fromkeys(formats, losses["all.jsonl"])


@pytest.mark.slow
def test_folder_that_datasets_saved_gives_the_tokens_of_its_texts() -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk("saved", num_shards=3)
    assert len(list(Path("saved").glob("*.arrow"))) == 3
    assert load("saved").sha256 == load("all.jsonl").sha256


@pytest.mark.slow
def test_a_large_file_is_prepared_in_bounded_memory(folder: Path) -> None:
    line = json.dumps({"text": " ".join(f"word{i * i % 977}" for i in range(400))}) + "\n"
    with Path("large.jsonl").open("w") as file:
        for _ in range(400):
            file.write(line * 250)
    size = Path("large.jsonl").stat().st_size
    assert size > 300e6
    words = ["data", "prepare", "large.jsonl", "--out", "out", "--processes", "2", "--json"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", PEAKS, *words], env=env, check=True, capture_output=True, text=True)
    assert max(int(line) for line in ran.stderr.splitlines()[-2:]) < 100_000
    assert json.loads(Path("out/index.json").read_text())["num_documents"] == 100_000
