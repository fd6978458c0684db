"""What a run says while it trains: a live progress bar with the time left, and plain lines where nobody watches."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_NUM_LINES = 20


def say(console: Console, text: object) -> None:
    """Print text as it is: folders have brackets and colons in their names, which rich would take for its own."""
    console.print(Text(str(text)), soft_wrap=True)


class StepProgress:
    """Shows how far training is; use as a context manager.

    On a terminal it is one live bar. In a log file it is about twenty lines in all.
    """

    def __init__(self, console: Console, *, first_step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._every = max(1, steps // _NUM_LINES)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first_step, pace="")

    def advance(self, step: int, *, loss: float, tokens_per_s: float) -> None:
        """Show that `step` steps are done."""
        pace = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, pace=pace)
        if not self._console.is_terminal and (step % self._every == 0 or step == self._steps):
            say(self._console, f"step {step}/{self._steps}  {pace}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
