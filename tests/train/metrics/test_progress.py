"""Messages of a run are printed without interpreting them as markup."""

import io

from rich.console import Console
from trellax.train.metrics.progress import StepProgress, say


def test_text_is_not_read_as_markup() -> None:
    file = io.StringIO()
    text = "resumed   of runs/[red]lr=[3]/b]/[/x] [link=a]:smile: " + "wide " * 40
    say(Console(file=file, width=40, force_terminal=True), text)
    assert file.getvalue() == f"{text}\n"


def test_bar_shows_no_loss_before_the_first_step() -> None:
    file = io.StringIO()
    with StepProgress(Console(file=file, width=120, force_terminal=True), first_step=0, steps=3) as progress:
        pass
    assert "0/3" in file.getvalue()
    assert "nan" not in file.getvalue()
    assert progress is not None


def test_line_of_a_mixture_of_experts_has_its_peak() -> None:
    file = io.StringIO()
    with StepProgress(Console(file=file, width=120), first_step=0, steps=1) as progress:
        progress.advance(1, loss=2.5, tokens_per_s=1000, expert_peak=1.234)
    assert file.getvalue() == "step 1/1  loss 2.500  1,000 tokens/s  expert peak 1.23\n"
