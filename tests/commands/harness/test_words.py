"""`trellax eval --tasks` says what is missing before any weight is read."""

import importlib.util
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.commands.harness.run_tasks import check_harness
from trellax.meshes import DataError

has_harness = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "computes the loss on --data or the scores of --tasks; neither is given"),
        (["--data", "a.txt", "--tasks", "a"], "both are given"),
        (["--data", "a.txt", "--limit", "3"], "--limit is for --tasks"),
        (["--tasks", "a", "--num-fewshot", "-1"], "--num-fewshot -1 is out of range"),
        pytest.param(
            ["--tasks", "a"],
            "pip install 'trellax[eval]'",
            marks=pytest.mark.skipif(has_harness, reason="lm_eval is installed"),
        ),
    ],
)
def test_words_that_do_not_fit_are_told(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(has_harness, reason="lm_eval is installed")
def test_missing_extra_is_told_in_python_too() -> None:
    with pytest.raises(DataError, match="tasks need lm-evaluation-harness"):
        check_harness()
