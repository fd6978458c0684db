"""Send the events of each step from process 0 to the others, through the key-value store of jax's coordinator.

    key                        value
    trellax/serve/steps/17     the events of step 17, or "end"
    trellax/serve/read/3       number of steps that process 3 has read

No collective is used: a process that waits for the next step must not occupy its GPU. Steps that all have read are
deleted, so that a server that runs for months holds a few hundred.
"""

import time
from collections.abc import Iterator, Sequence

from ...meshes.processes.join import coordination_client, num_processes, process_index
from ...meshes.processes.messages import wait_for_key
from .events import Event, read_events, write_events

_STEPS, _READ, _END = "trellax/serve/steps/", "trellax/serve/read/", "end"

KEPT_STEPS = 256
"""Number of steps after which those that all processes have read are deleted."""

_READ_EVERY = 32
_POLL_S = 0.01


class StepSender:
    """The side of process 0."""

    def __init__(self) -> None:
        self._client = coordination_client()
        self._num_sent = self._num_deleted = 0

    def send(self, events: Sequence[Event]) -> None:
        """Let all other processes apply events, and step once."""
        self._put(write_events(events))
        if self._num_sent - self._num_deleted > KEPT_STEPS:
            self._delete_read()

    def end(self) -> None:
        """Let all other processes end."""
        self._put(_END)

    def _put(self, text: str) -> None:
        self._client.key_value_set(f"{_STEPS}{self._num_sent}", text)
        self._num_sent += 1

    def _delete_read(self) -> None:
        """Delete steps that all have read; wait for some first if a process is far behind."""
        while (num_read := self._num_read()) <= self._num_deleted:
            time.sleep(_POLL_S)
        for step in range(self._num_deleted, num_read):
            self._client.key_value_delete(f"{_STEPS}{step}")
        self._num_deleted = num_read

    def _num_read(self) -> int:
        read = dict(self._client.key_value_dir_get(_READ))
        return min(int(read.get(f"{_READ}{index}", 0)) for index in range(1, num_processes()))


def receive_steps() -> Iterator[list[Event]]:
    """Yield the events of one step after another, until process 0 ends; on the other processes."""
    client, step = coordination_client(), 0
    while (text := wait_for_key(client, f"{_STEPS}{step}")) != _END:
        step += 1
        if step % _READ_EVERY == 0:
            client.key_value_set(f"{_READ}{process_index()}", str(step), allow_overwrite=True)
        yield read_events(text)
