"""What a run says is printed as it is."""

import io

from rich.console import Console
from trellax.train.progress import say


def test_text_is_no_markup() -> None:
    file = io.StringIO()
    text = "resumed   of runs/[red]lr=[3]/b]/[/x] [link=a]:smile: " + "wide " * 40
    say(Console(file=file, width=40, force_terminal=True), text)
    assert file.getvalue() == f"{text}\n"
