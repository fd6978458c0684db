"""Run folders made to do harm end in a sentence, or in the save before: nothing outside is touched, nothing hangs."""

import io
import shutil
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.configs.changes import check_changes
from trellax.configs.saved_config import load_saved_config, read_saved_config
from trellax.hub.model_folder import open_model
from trellax.hub.run_params import is_run_folder
from trellax.hub.saves.seal import Seal, hash_files, write_seal
from trellax.layers import param_counts
from trellax.meshes import CheckpointError, RunError, TrellaxError
from trellax.meshes.files.own_file import replace_file
from trellax.train import Checkpoints
from trellax.train.metrics import MetricsLog, Summary, read_metrics, read_summary, write_summary
from trellax.train.run_folder import Start, open_run_folder

from . import crafted
from .crafted import Craft, craft_seal, nest_folders, put_endless, put_folder, put_link, put_pipe, put_text, remove_nest

SAVE, DEEP = "checkpoints/2", "folders without end"
OURS = ("checkpoints", "lock", "metrics.jsonl", "metrics.jsonl.part", "summary.json", "summary.json.part", "loss.png")
OURS += ("loss.png.part", "tensorboard", "tokens", "profile", "tokenizer.json", "hf_config.json")
INSIDE = ("checkpoints/2", "checkpoints/3.part", "checkpoints/1.removing", "checkpoints/4.damaged")
INSIDE += ("tensorboard/events.out.tfevents.1.x", "tokens/x.npy", "profile/plugins")
PARTS = ("seal.json", "state", "state/d", "state/manifest.ocdbt", "_CHECKPOINT_METADATA", "new")
STRANGE_NAMES = ("²", "٣", "007", "-1", "+3", "1e3", "0x2", " 4", "3 ", "99999999999999999999", "3.part.x")

TO_SAVES: dict[str, Craft] = {
    **{f"link at {part}": put_link(f"{SAVE}/{part}") for part in PARTS},
    **{f"pipe at {part}": put_pipe(f"{SAVE}/{part}") for part in PARTS},
    "link to a device": put_link(f"{SAVE}/seal.json", "/dev/zero"),
    "endless seal": put_endless(f"{SAVE}/seal.json"),
    "endless array": crafted.put_endless_and_seal_it,
    "save that is a link": put_link(SAVE, "save"),
    "save that is a pipe": put_pipe(SAVE),
    "seal of numbers": put_text(f"{SAVE}/seal.json", b"1" * 5000),
    **{f"save named {name}": put_folder(f"checkpoints/{name}") for name in STRANGE_NAMES},
}
TO_FOLDERS: dict[str, Craft] = {
    **{f"link at {name}": put_link(name) for name in (*OURS, *INSIDE)},
    **{f"broken link at {name}": put_link(name, "nowhere") for name in OURS},
    **{f"pipe at {name}": put_pipe(name) for name in (*OURS, *INSIDE)},
    DEEP: nest_folders("checkpoints/3.part"),
}
TO_RECORDS: dict[str, Craft] = {
    "record without lines": put_endless("metrics.jsonl", num_bytes=1 << 24),
    "endless summary": put_endless("summary.json"),
    "endless lock": put_endless("lock"),
    "endless events": put_endless("tensorboard/events.out.tfevents.1.x"),
    "nested lock": put_text("lock", b"[" * 100_000),
    "nested record": put_text("metrics.jsonl", b"[" * 100_000 + b"\n"),
    "lock with other words": put_text("lock", b'{"process": "\x1b[31m", "host": ["x"]}'),
    "record of other words": put_text("metrics.jsonl", b'{"step": [1]}\n{"step": 1, "loss": "\xff"}\n7\n'),
}


CONFIG = load_config("tiny-dense")


def write_save(save: Path) -> None:
    """Write a save whose files are not arrays: nobody here loads them."""
    (save / "state" / "d").mkdir(parents=True)
    for name in ("_CHECKPOINT_METADATA", "state/manifest.ocdbt", "state/d/array"):
        (save / name).write_bytes(name.encode() * 100)
    seal = Seal(
        step=int(save.name),
        saved_at="2026-11-25T00:00:00+00:00",
        config=CONFIG.model_dump(mode="json"),
        data={"batches": 1, "sequences": 4, "corpus": "0" * 64},
        arrays={"params.all": ("float32", (param_counts(CONFIG.model).total,), "0" * 16)},
        files=hash_files(save),
    )
    write_seal(save, seal)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder with a run in it, and beside it what no command may touch; nothing takes long."""
    for step in (1, 2):
        write_save(tmp_path / "run" / "checkpoints" / str(step))
    outside = tmp_path / "outside"
    for folder in ("checkpoints/9.part", "checkpoints/photos.part", "save", "tensorboard", "tokens", "profile", "2"):
        (outside / folder).mkdir(parents=True)
        (outside / folder / "theirs").write_text("theirs")
    for name in ("lock", "metrics.jsonl", "metrics.jsonl.part", "summary.json", "summary.json.part", "loss.png"):
        (outside / name).write_text("theirs")
    before, start_s = snapshot(outside), time.monotonic()
    yield tmp_path
    remove_nest(tmp_path / "run")
    assert snapshot(outside) == before
    assert time.monotonic() - start_s < 60


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def read_all(run_folder: Path) -> str:
    """Read a run folder in every way that is not training; return what was said. Anything but our errors fails."""
    said = io.StringIO()

    def accept(seal: Seal) -> None:
        saved = read_saved_config(seal, folder=run_folder, say=said.write)
        check_changes(saved, CONFIG, was=None, corpus="", changes="refuse", step=seal.step)

    def restore() -> None:
        with Checkpoints(run_folder, say=said.write) as checkpoints:
            if seal := checkpoints.newest(damaged="set aside"):
                accept(seal)

    with redirect_stdout(said), redirect_stderr(said):
        main(["checkpoints", str(run_folder), "--verify"])
        for read in (lambda: load_saved_config(run_folder), lambda: open_model(run_folder), restore):
            try:
                read()
            except TrellaxError as error:
                said.write(str(error))
    assert "Traceback" not in said.getvalue()
    return said.getvalue()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "seeds", [range(8), *(pytest.param(range(n, n + 100), marks=pytest.mark.slow) for n in (8, 108, 208))]
)
def test_seal_with_the_right_hash_and_wrong_contents_is_reported(seeds: range, place: Path) -> None:
    for seed in seeds:
        shutil.rmtree(place / "run" / SAVE, ignore_errors=True)
        write_save(place / "run" / SAVE)
        craft_seal(seed)(place / "run", place / "outside")
        read_all(place / "run")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", TO_SAVES)
def test_save_with_a_link_or_an_endless_file_is_skipped(kind: str, place: Path) -> None:
    TO_SAVES[kind](place / "run", place / "outside")
    read_all(place / "run")
    with Checkpoints(place / "run") as checkpoints:
        seal = checkpoints.newest()
    is_used = "named" in kind
    assert seal
    assert seal.step == (2 if is_used else 1)


def take(run_folder: Path, start: Start) -> str:
    """Do what training does with a run folder before its first step and after its last; return the error."""
    try:
        with open_run_folder(run_folder, start=start, say=str) as held:
            read_summary(run_folder)
            with MetricsLog(run_folder, resumed_step=2) as log:
                log.write(3, {"loss": 1.0})
            numbers = {
                "steps": 1,
                "final_train_loss": 1.0,
                "final_val_loss": 1.0,
                "tokens_per_s": 1.0,
                "wall_time_s": 1,
            }
            write_summary(Summary(ended="done", mesh="", schedule="", folder=str(run_folder), **numbers))
            replace_file(run_folder / "loss.png", b"picture")
            held.check()
    except TrellaxError as error:
        return str(error)
    return ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", [*sorted(TO_FOLDERS.keys() - {DEEP}), pytest.param(DEEP, marks=pytest.mark.slow)])
def test_run_writes_and_removes_nothing_through_its_folder(kind: str, place: Path) -> None:
    TO_FOLDERS[kind](place / "run", place / "outside")
    told = [take(place / "run", start) for start in ("resume", "fresh", "replace")]
    assert kind == DEEP or all("where a run has a f" in text for text in told), told


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", TO_RECORDS)
def test_record_that_no_run_wrote_is_left_out(kind: str, place: Path) -> None:
    TO_RECORDS[kind](place / "run", place / "outside")
    assert take(place / "run", "resume") == ""
    assert read_metrics(place / "run") == [{"step": 3, "loss": 1.0}]


def test_record_that_is_too_large_is_refused(place: Path) -> None:
    put_endless("metrics.jsonl")(place / "run", place / "outside")
    with pytest.raises(RunError, match="such a file has at most 4,294,967,296"):
        read_metrics(place / "run")


def test_run_folder_itself_may_be_a_link(place: Path) -> None:
    (place / "link").symlink_to("run")
    assert take(place / "link", "resume") == ""
    with Checkpoints(place / "link") as checkpoints:
        seal = checkpoints.newest()
    assert seal
    assert seal.step == 2


def test_foreign_entries_beside_the_saves_are_left_alone(place: Path) -> None:
    kept = place / "run" / "checkpoints"
    for name in ("photos.part", "notes.removing", "007.part"):
        (kept / name).mkdir()
    (kept / "best").symlink_to("2")
    (kept / "3.part").mkdir()
    assert take(place / "run", "resume") == ""
    assert sorted(path.name for path in kept.iterdir()) == [
        "007.part",
        "1",
        "2",
        "best",
        "notes.removing",
        "photos.part",
    ]


def test_run_folder_whose_saves_are_a_link_is_refused(place: Path) -> None:
    (place / "run" / "checkpoints").rename(place / "saves")
    (place / "run" / "checkpoints").symlink_to(place / "saves")
    assert is_run_folder(place / "run")
    with pytest.raises(CheckpointError, match="checkpoints is a link"):
        load_saved_config(place / "run")
