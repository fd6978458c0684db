"""Many processes on one machine: the same run as in one, and when one differs, fails or is lost all end and say which.

Between processes gloo sums in another order than within one, so losses agree to 1e-5 of their size.
"""

import json
import shutil
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from .conftest import losses
from .zygote import Child, Zygote

SILENCE_S = 6
LOST = 75


def start(
    zygote: Zygote, words: str, *, count: int, each: Sequence[str] = (), largest_file: Sequence[int | None] = ()
) -> list[Child]:
    """Start that many processes of a run; `each` are words for one of them alone, as is the `largest_file`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = f"{words} --coordinator 127.0.0.1:{port} --num-processes {count}"
    own, largest = each or [""] * count, largest_file or [None] * count
    return [
        zygote.start(f"{common} --process-id {index} {own[index]}", largest_file=largest[index])
        for index in range(count)
    ]


def wait_for_step(child: Child, run_folder: Path, step: int, *, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while max(losses(run_folder), default=0) < step:
        assert time.monotonic() < end, child.said()
        time.sleep(0.1)


def checked(zygote: Zygote, survivors: list[Child], *, culprit: int, count: int) -> None:
    """The survivors end within a minute, with the code of a lost process, and name the culprit."""
    end = time.monotonic() + 60
    codes = [zygote.wait(child, seconds=end - time.monotonic()) for child in survivors]
    assert codes == [LOST] * len(survivors)
    for child in survivors:
        assert child.said().splitlines()[-1].startswith(f"process {culprit} of {count} "), child.said()


@pytest.fixture(scope="module")
def words(tiny_words: str) -> str:
    return (
        f"{tiny_words} --train.steps 4000 --model.num_layers 4 --pipeline.microbatches 2 --checkpoint.every 5 "
        f"--run.silence_s {SILENCE_S} --optimizer.learning_rate 1e-3"
    )


def test_run_moves_from_one_process_to_two_loses_one_and_resumes_on_one(
    zygote: Zygote, folder: Path, words: str
) -> None:
    words = f"{words} --mesh.pipe 2 --mesh.tensor 2 --fake-devices 4 --model.num_layers 2"
    uncut, moved = folder / "uncut", folder / "moved"
    alone = zygote.start(f"{words} --checkpoint.keep_every 5 --run.name uncut")
    wait_for_step(alone, uncut, 20)
    alone.kill()
    zygote.wait(alone)
    shutil.copytree(uncut / "checkpoints" / "5", moved / "checkpoints" / "5")

    both = start(zygote, f"{words} --run.name moved", count=2)
    wait_for_step(both[0], moved, 12)
    both[1].kill()
    zygote.wait(both[1])
    checked(zygote, both[:1], culprit=1, count=2)
    assert "resumed   at step 5 of" in both[0].said()
    # Only process 0 talks.
    assert both[1].out.read_text() == ""
    assert "step" not in both[1].said()

    again = zygote.start(f"{words} --run.name moved")
    again.wait_for("resumed ")
    wait_for_step(again, moved, max(losses(moved)) + 3)
    again.kill(signal.SIGTERM)
    assert zygote.wait(again) == 0, again.said()
    expected, here = losses(uncut), losses(moved)
    last = min(max(expected), max(here))
    assert sorted(here)[: last - 5] == list(range(6, last + 1))
    steps = range(6, last + 1)
    np.testing.assert_allclose([here[i] for i in steps], [expected[i] for i in steps], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("culprit", [2, 0])
def test_four_processes_lose_one_and_go_on_with_fewer(
    fault: signal.Signals, culprit: int, zygote: Zygote, folder: Path, words: str
) -> None:
    name = f"four-{fault.name}-{culprit}"
    four = start(zygote, f"{words} --mesh.pipe 4 --mesh.tensor 2 --fake-devices 8 --run.name {name}", count=4)
    wait_for_step(four[0], folder / name, 12)
    four[culprit].kill(fault)
    checked(zygote, [child for child in four if child is not four[culprit]], culprit=culprit, count=4)
    four[culprit].kill()
    zygote.wait(four[culprit])
    fewer, mesh = (3, "--mesh.data 3 --fake-devices 3") if culprit else (2, "--mesh.pipe 2 --fake-devices 2")
    # Three processes share a batch of eight only if it is another one.
    batch = "--train.batch_size 12 --override" if fewer == 3 else ""
    rest = start(zygote, f"{words} {mesh} {batch} --run.name {name}", count=fewer)
    rest[0].wait_for("resumed ")
    wait_for_step(rest[0], folder / name, max(losses(folder / name)) + 3)
    # Any of them may be asked; all stop after the same step.
    rest[1].kill(signal.SIGTERM)
    assert [zygote.wait(child) for child in rest] == [0] * fewer, rest[0].said()
    assert "stopped by SIGTERM" in rest[0].out.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_processes_train_like_one(zygote: Zygote, folder: Path, tiny_words: str) -> None:
    words = f"{tiny_words} --train.steps 12 --model.num_layers 4 --pipeline.microbatches 2 --mesh.pipe 4 --mesh.data 2"
    words += " --fake-devices 8 --json"
    code, alone = zygote.run(f"{words} --run.name one")
    assert code == 0, alone.said()
    four = start(zygote, f"{words} --run.name four", count=4)
    assert [zygote.wait(child, seconds=300) for child in four] == [0] * 4, four[0].said()
    expected, here = losses(folder / "one"), losses(folder / "four")
    np.testing.assert_allclose(list(here.values()), list(expected.values()), rtol=1e-5)
    assert json.loads(four[0].out.read_text())["steps"] == 12
    assert [child.out.read_text() for child in four[1:]] == [""] * 3


@pytest.mark.slow
def test_process_that_loses_its_corpus_says_so_and_ends_all(zygote: Zygote, folder: Path, words: str) -> None:
    tokens = [folder / f"tokens{index}.bin" for index in range(2)]
    for file in tokens:
        np.arange(20_000, dtype=np.uint16).__mod__(250).tofile(file)
    words = f"{words} --data.source tokens --mesh.pipe 2 --fake-devices 2 --run.name corpus"
    both = start(zygote, words, count=2, each=[f"--data.paths {file}" for file in tokens])
    wait_for_step(both[0], folder / "corpus", 12)
    with tokens[1].open("ab") as file:
        file.truncate(1000)
    assert [zygote.wait(child) for child in both] == [2, 2]
    assert "tokens1.bin: changed while the run read it" in both[1].said()
    assert "tokens1.bin: changed while the run read it" in both[0].said()


@pytest.mark.slow
def test_mistake_of_all_is_reported_once(zygote: Zygote, words: str) -> None:
    both = start(zygote, f"{words} --mesh.pipe 2 --mesh.tensor 3 --fake-devices 2 --run.name wrong", count=2)
    assert [zygote.wait(child) for child in both] == [2, 2]
    assert "needs data 1 x tensor 3 x pipe 2 = 6 devices, but 2 are visible" in both[0].said()
    assert both[1].said() == ""


def test_processes_that_differ_end_before_they_join(zygote: Zygote, words: str) -> None:
    both = start(
        zygote, f"{words} --mesh.pipe 2 --fake-devices 2", count=2, each=["", "--optimizer.learning_rate 2e-3"]
    )
    assert [zygote.wait(child) for child in both] == [2, 2]
    for child in both:
        assert "process 1 has optimizer.learning_rate=0.002, process 0 has 0.001." in child.said()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("--model.hidden_size 64", "process 1 has model.hidden_size=64, process 0 has 32"),
        ("--run.seed 5", "process 1 has run.seed=5, process 0 has 0"),
        ("--train.steps 20", "process 1 has train.steps=20, process 0 has 4000"),
        ("--checkpoint.every 3", "process 1 has checkpoint.every=3, process 0 has 5"),
        ("--fresh", "process 1 has --fresh=yes, process 0 has no"),
        ("--override", "process 1 has --override=yes, process 0 has no"),
        ("--num-processes 3", "process 1 has --num-processes=3, process 0 has 2"),
        ("--data.paths {other}", "process 1 has corpus=sha256 "),
        ("--run.folder {elsewhere}", "process 1 has run folder="),
    ],
)
def test_setting_that_differs_between_processes_is_reported_before_training(
    own: str, told: str, zygote: Zygote, folder: Path, words: str
) -> None:
    other = folder / "other.txt"
    other.write_bytes(bytes(1 + i * i % 249 for i in range(20_000)))
    own = own.format(other=other, elsewhere=folder / "elsewhere")
    both = start(zygote, f"{words} --mesh.pipe 2 --fake-devices 2 --run.name differs", count=2, each=["", own])
    assert [zygote.wait(child) for child in both] == [2, 2]
    assert told in both[0].said()
    assert losses(folder / "differs") == {}


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_save_that_fails_in_one_process_ends_all(culprit: int, zygote: Zygote, folder: Path, words: str) -> None:
    largest = [20_000 if index == culprit else None for index in range(2)]
    words = f"{words} --mesh.pipe 2 --fake-devices 2 --run.name full-{culprit}"
    both = start(zygote, words, count=2, largest_file=largest)
    wait_for_step(both[0], folder / f"full-{culprit}", 5)
    started = time.monotonic()
    assert [zygote.wait(child) for child in both] == [2, 2]
    assert time.monotonic() - started < 60
    for child in both:
        assert "step 5 could not be saved" in child.said()
    assert f"process {culprit} of 2" in both[1 - culprit].said()


@pytest.mark.slow
@pytest.mark.parametrize("missing", [0, 1])
def test_process_that_is_never_started_is_named(missing: int, zygote: Zygote, words: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"{words} --coordinator 127.0.0.1:{port} --num-processes 2 --process-id {1 - missing} --start-timeout 3"
    code, child = zygote.run(words, seconds=30)
    assert code == LOST
    assert f"process {missing} of 2 has not " in child.said()
    assert "in 3 s" in child.said()


@pytest.mark.slow
def test_process_that_is_stopped_for_longer_than_jax_waits_is_named(zygote: Zygote, folder: Path, words: str) -> None:
    # jax's own client gives up first here, and aborts.
    words = f"{words} --mesh.pipe 2 --fake-devices 2 --run.silence_s 50 --run.name stopped"
    both = start(zygote, words, count=2)
    wait_for_step(both[0], folder / "stopped", 7)
    both[0].kill(signal.SIGSTOP)
    checked(zygote, both[1:], culprit=0, count=2)
    both[0].kill()
    zygote.wait(both[0])
