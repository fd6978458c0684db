"""Repeat the steps of process 0 with the engine of another process, which has no clients."""

import contextlib
import signal
from collections.abc import Iterable, Iterator

from ...meshes import ServeError
from ..engine import Engine
from ..requests import Request, ServedSequence
from .events import Event


def follow(engine: Engine, steps: Iterable[list[Event]]) -> int:
    """Apply the events of each step and step the engine; return the number of steps once process 0 has ended."""
    open_sequences: dict[int, ServedSequence] = {}
    num_steps = 0
    for events in steps:
        for event in events:
            if isinstance(event, Request):
                sequence = engine.submit(event)
                open_sequences[sequence.id] = sequence
            elif event in open_sequences:
                engine.cancel(open_sequences[event])
        # Logits that are not finite end a sequence here as on process 0, which tells its client.
        with contextlib.suppress(ServeError):
            engine.step()
        num_steps += 1
        open_sequences = {key: one for key, one in open_sequences.items() if one.finish_reason is None}
    return num_steps


@contextlib.contextmanager
def ignore_signals() -> Iterator[None]:
    """Ignore the first SIGTERM and SIGINT inside the context: launchers send them to all processes; not the second."""
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in signals}

    def hear(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)

    for number in signals:
        signal.signal(number, hear)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, before[number])
