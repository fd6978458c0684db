"""What the processes of a run say to each other between steps; with one process nothing is sent.

Texts go through a collective of the devices, or, where not all may be there to take part, through the key-value store
of jax's coordinator.
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
from .join import coordination_client, process_index

_TEXT_BYTES = 1024
_FAILURES, _FACTS = "trellax/failures/", "trellax/facts/"
_WAIT_S = 10.0


def is_first() -> bool:
    """Whether this is the process that talks and writes the run folder's own files."""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Return every process's text, cut to 1024 bytes, in the order of processes; all must call it."""
    if jax.process_count() == 1:
        return [text]
    own = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    own[: encoded.size] = encoded
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def text_of_first(text: str) -> str:
    """Return the first process's text; all must call it, the others' is not looked at."""
    return gather_texts(text)[0]


def first_does(action: Callable[[], None]) -> None:
    """Let the first process do what only one may; returns on every process once it is done.

    Raises:
        TrellaxError: what the action raised, on every process.
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
    """Return once all processes have said that they have the same facts; all call it, with topics in the same order.

    Raises:
        RunError: they differ, on every process.
    """
    client, index, count = coordination_client(), jax.process_index(), jax.process_count()
    if count == 1:
        return
    folder = f"{_FACTS}{topic}/"
    client.key_value_set(f"{folder}{index}", json.dumps(dict(facts)))
    if index == 0:
        all_facts = {other: json.loads(_wait_for(client, f"{folder}{other}")) for other in range(count)}
        client.key_value_set(f"{folder}verdict", json.dumps(describe_differences(all_facts)))
    if differ := json.loads(_wait_for(client, f"{folder}verdict")):
        raise RunError(f"{differ}.", fix="give all processes the same files.")


def require_one_program(what: str, lowered: Any) -> None:
    """Return once all processes have the same program: others than that would wait for each other for ever.

    Raises:
        RunError: they differ, in something that no other check has a name for.
    """
    if jax.process_count() > 1:
        text = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]
        require_agreement(what, {f"program of {what}": text})


def announce_failure(error: BaseException, *, code: int = 2) -> None:
    """Tell all processes that this one has failed: their watches end them, and this one, with this exit code."""
    if client := coordination_client():
        # A coordinator that does not answer is found out by time.
        with contextlib.suppress(Exception):
            text = f"{code} {type(error).__name__}: {error}"
            client.key_value_set(f"{_FAILURES}{process_index()}", text, allow_overwrite=True)


def read_failures() -> dict[int, tuple[int, str]]:
    """Return exit code and text of every process that has failed."""
    found = {}
    for key, said in coordination_client().key_value_dir_get(_FAILURES):
        code, _, text = said.partition(" ")
        found[int(key.rpartition("/")[2])] = (int(code), text)
    return found


def _wait_for(client: Any, key: str) -> str:
    # For ever: another process may tokenize a corpus for hours, and one that is lost is the watch's to find.
    while True:
        started = time.monotonic()
        try:
            return client.blocking_key_value_get(key, int(_WAIT_S * 1000))
        except jax.errors.JaxRuntimeError:
            # A coordinator that is gone fails at once.
            time.sleep(max(0.0, 1.0 - (time.monotonic() - started)))
