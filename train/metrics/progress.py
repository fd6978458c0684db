"""Show the progress of training: a live bar with the time left on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_NUM_LINES = 20


def say(console: Console, text: object) -> None:
    """Print text without rich's markup: the name of a folder may hold brackets and colons."""
    console.print(Text(str(text)), soft_wrap=True)


class StepProgress:
    """Show how many steps are done, with loss and throughput; use as a context manager.

    On a terminal it is one live bar, in a log file about twenty lines in all.
    """

    def __init__(self, console: Console, *, first_step: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._line_every = max(1, steps // _NUM_LINES)
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first_step, numbers="")

    def advance(self, step: int, *, loss: float, tokens_per_s: float, expert_peak: float | None = None) -> None:
        """Show that `step` steps are done.

        Args:
            expert_peak: tokens of the most loaded expert of any layer over the mean, of a mixture of experts.
        """
        numbers = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s"
        numbers += f"  expert peak {expert_peak:.2f}" if expert_peak is not None else ""
        self._bar.update(self._task, completed=step, numbers=numbers)
        if not self._console.is_terminal and (step % self._line_every == 0 or step == self._steps):
            say(self._console, f"step {step}/{self._steps}  {numbers}")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
