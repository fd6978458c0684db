"""Files that change under a run: it stops with what was good, or mends its record; it never ends as if nothing was."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from trellax.hub.saves.seal import read_seal
from trellax.train.metrics import read_metrics

from .conftest import losses
from .zygote import Zygote


def write_in_place(tokens: Path) -> None:
    with tokens.open("r+b") as file:
        file.write(bytes(20_000))


def put_another_in_its_place(tokens: Path) -> None:
    np.zeros(20_000, np.uint16).tofile(tokens.with_name("other.bin"))
    tokens.with_name("other.bin").rename(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("change", [write_in_place, put_another_in_its_place])
def test_corpus_that_changes_ends_the_run_with_what_it_was(
    change: Callable[[Path], None], zygote: Zygote, folder: Path, tiny_words: str
) -> None:
    tokens, run = folder / f"{change.__name__}.bin", folder / change.__name__
    np.arange(20_000, dtype=np.uint16).__mod__(250).tofile(tokens)
    words = f"{tiny_words} --data.source tokens --data.paths {tokens} --train.steps 4000 --run.name {run.name}"
    child = zygote.start(words)
    child.wait_for("step 200/4000")
    shutil.copy(tokens, folder / "before.bin")
    change(tokens)
    assert zygote.wait(child) == 2
    assert f"{tokens}: changed while the run read it: it has other tokens. Step " in child.said()
    (save,) = (run / "checkpoints").iterdir()
    assert f"Step {save.name} is saved." in child.said()
    assert read_seal(save)[0]
    # It goes on with the old tokens, and with no others.
    code, child = zygote.run(words)
    assert code == 2
    assert "the corpus: was sha256" in child.said()
    shutil.copy(folder / "before.bin", tokens)
    again = zygote.start(words)
    again.wait_for(f"resumed   at step {save.name} ")
    again.kill()
    zygote.wait(again)


@pytest.mark.slow
@pytest.mark.parametrize("is_replaced", [False, True])
def test_record_that_is_removed_is_whole_at_the_end(
    is_replaced: bool, zygote: Zygote, folder: Path, tiny_words: str
) -> None:
    run = folder / f"record{is_replaced}"
    child = zygote.start(f"{tiny_words} --train.steps 400 --run.name {run.name}")
    child.wait_for("step 100/400")
    (run / "metrics.jsonl").unlink()
    if is_replaced:
        (run / "metrics.jsonl").write_text("theirs")
    assert zygote.wait(child) == 0, child.said()
    assert sorted(losses(run)) == list(range(1, 401))
    assert "is there again, whole" in child.said()


@pytest.mark.slow
@pytest.mark.parametrize("is_made_anew", [False, True])
def test_run_folder_that_moves_ends_the_run(is_made_anew: bool, zygote: Zygote, folder: Path, tiny_words: str) -> None:
    run, away = folder / f"moves{is_made_anew}", folder / f"away{is_made_anew}"
    words = f"{tiny_words} --checkpoint.every 50 --train.steps 4000 --run.name {run.name}"
    child = zygote.start(words)
    child.wait_for("step 200/4000")
    run.rename(away)
    if is_made_anew:
        run.mkdir()
    assert zygote.wait(child) == 2, child.said()
    assert f"{run} was moved or removed while the run wrote to it" in child.said()
    assert not (run / "metrics.jsonl").exists()
    steps = max(int(save.name) for save in (away / "checkpoints").iterdir() if save.name.isdigit())
    assert max(line["step"] for line in read_metrics(away)) >= steps >= 100
    shutil.rmtree(run, ignore_errors=True)
    away.rename(run)
    again = zygote.start(words)
    again.wait_for(f"resumed   at step {steps} ")
    again.kill()
    zygote.wait(again)
