"""Steps go through a key-value store, each once and in order, and those that all have read are deleted."""

import threading

import pytest
from trellax.serve.processes import channel
from trellax.serve.processes.channel import StepSender, receive_steps


class Store:
    """The part of the coordinator's store that is used, in one process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, *, allow_overwrite: bool = False) -> None:
        with self._changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_ms: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, timeout_ms / 1000)
            return self.values[key]

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(folder)]

    def key_value_delete(self, key: str) -> None:
        with self._changed:
            del self.values[key]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(channel, "coordination_client", lambda: store)
    monkeypatch.setattr(channel, "num_processes", lambda: 3)
    return store


def test_every_process_reads_all_steps_and_the_store_stays_small(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    own = threading.local()
    monkeypatch.setattr(channel, "process_index", lambda: own.index)
    read: dict[int, list[object]] = {1: [], 2: []}

    def receive(index: int) -> None:
        own.index = index
        read[index].extend(event for events in receive_steps() for event in events)

    threads = [threading.Thread(target=receive, args=(index,)) for index in read]
    for thread in threads:
        thread.start()
    sender, most = StepSender(), 0
    count = 5 * channel.KEPT_STEPS
    for step in range(count):
        sender.send([step])
        most = max(most, len(store.values))
    sender.end()
    for thread in threads:
        thread.join(30)
    assert read == {1: list(range(count)), 2: list(range(count))}
    assert most <= channel.KEPT_STEPS + 4
