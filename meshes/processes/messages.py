"""Messages between the processes of a run, outside its training steps; a single process sends nothing.

Texts are sent by a collective over the devices. Where some processes may not take part, they go through the key-value
store of jax's coordinator.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..errors import RunError, TrellaxError
from .agreement import Facts, describe_differences
from .join import coordination_client, num_processes, process_index

_TEXT_BYTES = 1024
_FAILURES, _FACTS = "trellax/failures/", "trellax/facts/"
_WAIT_S = 10.0


def is_first() -> bool:
    """Return whether this is process 0, which prints and writes the files of the run folder."""
    return process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Gather one text from every process, cut to 1024 bytes, in the order of processes; all must call it."""
    # Not jax.process_count(), which starts a backend: a save can be read before `use_fake_devices` is called.
    if num_processes() == 1:
        return [text]
    own = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    own[: encoded.size] = encoded
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def text_of_first(text: str) -> str:
    """Broadcast the text of process 0; all must call it, and the texts of the others are ignored."""
    return gather_texts(text)[0]


def first_does(action: Callable[[], None]) -> None:
    """Run an action on process 0 alone; return on every process once it is done.

    Raises:
        TrellaxError: the action's own error on process 0, a `RunError` with its text on the others.
    """
    raised: TrellaxError | None = None
    if is_first():
        try:
            action()
        except TrellaxError as error:
            raised = error
    told = text_of_first(str(raised) if raised else "")
    if raised:
        raise raised
    if told:
        raise RunError(told)


def require_agreement(topic: str, facts: Facts) -> None:
    """Check that all processes have the same facts; all must call it, with topics in the same order.

    Raises:
        RunError: facts differ; raised on every process.
    """
    client, index, count = coordination_client(), jax.process_index(), jax.process_count()
    if count == 1:
        return
    folder = f"{_FACTS}{topic}/"
    client.key_value_set(f"{folder}{index}", json.dumps(dict(facts)))
    if index == 0:
        all_facts = {other: json.loads(wait_for_key(client, f"{folder}{other}")) for other in range(count)}
        client.key_value_set(f"{folder}verdict", json.dumps(describe_differences(all_facts)))
    if differ := json.loads(wait_for_key(client, f"{folder}verdict")):
        raise RunError(f"{differ}.", fix="give all processes the same files.")


def require_one_program(what: str, lowered: Any) -> None:
    """Check that all processes have compiled the same program; different ones would wait for each other without end.

    Raises:
        RunError: programs differ although all facts that were compared by name agree.
    """
    if jax.process_count() > 1:
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]
        require_agreement(what, {f"program of {what}": text})


def announce_failure(error: BaseException, *, code: int = 2) -> None:
    """Tell all processes that this one has failed; the watch of each then ends it with this exit code."""
    if client := coordination_client():
        # An unreachable coordinator is noticed by the other processes' heartbeat timeouts.
        with contextlib.suppress(Exception):
            text = f"{code} {type(error).__name__}: {error}"
            client.key_value_set(f"{_FAILURES}{process_index()}", text, allow_overwrite=True)


def read_failures() -> dict[int, tuple[int, str]]:
    """Return the exit code and error text of every failed process, by index."""
    found = {}
    for key, said in coordination_client().key_value_dir_get(_FAILURES):
        code, _, text = said.partition(" ")
        found[int(key.rpartition("/")[2])] = (int(code), text)
    return found


def wait_for_key(client: Any, key: str) -> str:
    """Return the value of a key of the coordinator's store, once it has one."""
    # Without a limit: another process may tokenize a corpus for hours, and the watch detects one that is lost.
    while True:
        started = time.monotonic()
        try:
            return client.blocking_key_value_get(key, int(_WAIT_S * 1000))
        except jax.errors.JaxRuntimeError:
            # If the coordinator is gone the call fails at once: do not spin.
            time.sleep(max(0.0, 1.0 - (time.monotonic() - started)))
