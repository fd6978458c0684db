"""Rendezvous of processes before jax connects them: all must arrive in time, with the same facts.

jax itself would wait for minutes and then abort from C++, without naming the missing process. So process 0 first
listens on the coordinator's port, and every other process sends it one line of JSON:

    process 1                              process 0                             process 2
      {"index": 1, "facts": {...}}  ---->  listens; compares facts  <----  {"index": 2, "facts": {...}}
      {"differ": "", "missing": ""} <----  closes the port, answers ---->  {"differ": "", "missing": ""}
      jax.distributed.initialize           jax.distributed.initialize      jax.distributed.initialize

The answer, the verdict, is sent once all have arrived or time is up. Afterwards jax listens on the port.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import LostProcessError, MeshError, RunError
from .agreement import Facts, describe_differences, name_processes
from .launchers import Processes

_COUNT = "--num-processes"
_MOST_BYTES = 1 << 20
_WORD_S, _RETRY_S, _GRACE_S, _LINGER_S = 5.0, 0.2, 10.0, 5.0
"""Seconds to receive one line; between two attempts to connect; to wait longer for a late verdict; to wait for the
remaining processes once two have differed."""


@dataclass(frozen=True)
class _Verdict:
    differ: str = ""
    missing: str = ""


@dataclass(frozen=True)
class _Guest:
    """A connected process that waits for the verdict, for at most `left_s` seconds."""

    connection: socket.socket
    index: int
    facts: Facts
    left_s: float

    @property
    def is_waiting(self) -> bool:
        """Whether it is still connected; it sends nothing more, so a readable socket has been closed."""
        self.connection.setblocking(False)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False


def meet(processes: Processes, *, facts: Facts, start_s: float) -> None:
    """Wait until all processes have arrived with the same facts; otherwise raise the same error on every process.

    Args:
        start_s: seconds to wait for the others; the shortest wait of all processes applies.

    Raises:
        MeshError: process 0 cannot listen on its port.
        RunError: facts differ.
        LostProcessError: some processes did not arrive.
    """
    own = {_COUNT: str(processes.count), **facts}
    verdict = (
        _receive_guests(processes, own, start_s=start_s)
        if processes.index == 0
        else _visit(processes, own, start_s=start_s)
    )
    if verdict.differ:
        raise RunError(
            f"{verdict.differ}.",
            fix="start all processes with one command, the same files and versions, each with an id of its own.",
        )
    if verdict.missing:
        raise LostProcessError(
            f"{verdict.missing}.",
            fix="start all processes, with the same --coordinator: a free port on the machine of process 0. "
            "--start-timeout says how long they wait for each other.",
        )
    if processes.index:
        _wait_for_jax(processes)


def _receive_guests(processes: Processes, facts: Facts, *, start_s: float) -> _Verdict:
    guests: list[_Guest] = []
    end = time.monotonic() + start_s
    with contextlib.ExitStack() as connections:
        with _listen(processes) as server:
            while _are_missing(guests, facts) and (left_s := end - time.monotonic()) > 0:
                new = _accept(server, connections, left_s=left_s)
                guests = [guest for guest in [*guests, *new] if guest.is_waiting]
                # No process waits longer than it was told to, so the shortest time left ends the wait for all.
                waits_s = min((guest.left_s for guest in new), default=left_s)
                # Once two have differed, wait only briefly for the others, so that they get the verdict too.
                waits_s = min(waits_s, _LINGER_S) if new and _find_differences(guests, facts) else waits_s
                end = min(end, time.monotonic() + waits_s)
        verdict = _judge(processes, guests, facts, start_s=start_s)
        # The port is free by now: a process that has the verdict expects jax on it.
        for guest in guests:
            with contextlib.suppress(OSError):
                guest.connection.settimeout(_WORD_S)
                _send(guest.connection, asdict(verdict))
    return verdict


def _are_missing(guests: list[_Guest], facts: Facts) -> bool:
    """Return whether fewer have arrived than the largest --num-processes among them."""
    return len(guests) + 1 < max(int(each[_COUNT]) for each in (facts, *(guest.facts for guest in guests)))


def _find_differences(guests: list[_Guest], facts: Facts) -> str:
    indices = [0, *(guest.index for guest in guests)]
    if twice := {index for index in indices if indices.count(index) > 1}:
        return f"--process-id {min(twice)} is given to {indices.count(min(twice))} processes"
    return describe_differences({0: facts, **{guest.index: guest.facts for guest in guests}})


def _judge(processes: Processes, guests: list[_Guest], facts: Facts, *, start_s: float) -> _Verdict:
    if differ := _find_differences(guests, facts):
        return _Verdict(differ=differ)
    if missing := set(range(1, processes.count)) - {guest.index for guest in guests}:
        verb = "has" if len(missing) == 1 else "have"
        who = f"{name_processes(missing)} of {processes.count}"
        return _Verdict(missing=f"{who} {verb} not arrived at {processes.coordinator} in {start_s:g} s")
    return _Verdict()


def _visit(processes: Processes, facts: Facts, *, start_s: float) -> _Verdict:
    """Connect to process 0 until it answers: it may start later than this process, or be restarted."""
    end, problem = time.monotonic() + start_s, ""
    while (left_s := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((processes.host, processes.port), timeout=min(left_s, _WORD_S)) as connection:
                _send(connection, {"index": processes.index, "left_s": left_s, "facts": dict(facts)})
                # Process 0 answers when its own time is up, which may be a little after ours.
                connection.settimeout(left_s + _GRACE_S)
                return _Verdict(**_receive(connection))
        except OSError as error:
            problem = error.strerror or str(error)
        except (ValueError, TypeError):
            problem = "another program listens there, not a waiting trellax"
        time.sleep(_RETRY_S)
    who = f"process 0 of {processes.count}"
    return _Verdict(missing=f"{who} has not answered at {processes.coordinator} in {start_s:g} s: {problem}")


def _accept(server: socket.socket, connections: contextlib.ExitStack, *, left_s: float) -> list[_Guest]:
    """Accept one process, if one connects within a second; a connection that sends no valid facts is closed."""
    # A second at most: the caller also looks for guests that have left.
    server.settimeout(min(1.0, left_s))
    with contextlib.suppress(OSError):
        connection, _ = server.accept()
        connections.enter_context(connection)
        connection.settimeout(_WORD_S)
        try:
            said = _receive(connection)
            facts = {str(name): str(value) for name, value in said["facts"].items()}
            int(facts[_COUNT])
            return [_Guest(connection, int(said["index"]), facts, float(said["left_s"]))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            connection.close()
    return []


@contextlib.contextmanager
def _listen(processes: Processes) -> Iterator[socket.socket]:
    """Listen where jax will, to find a port in use: jax would share it with its owner, or crash the process."""
    # Parsed as jax does: all addresses of this machine unless JAX_COORDINATOR_BIND_ADDRESS is set.
    host, _, port = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{processes.port}").rpartition(":")
    is_any = host == "[::]" and socket.has_dualstack_ipv6()
    host = "" if host == "[::]" else host.strip("[]")
    family = socket.AF_INET6 if is_any or ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, int(port)), family=family, backlog=4096, dualstack_ipv6=is_any)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
        raise MeshError(
            f"process 0 of {processes.count} cannot listen at {processes.coordinator}: {problem}.",
            fix="give all processes another port in --coordinator, a free one on this machine, and only one of them "
            "--process-id 0.",
        ) from None
    with server:
        yield server


def _wait_for_jax(processes: Processes) -> None:
    """Wait until jax of process 0 listens; a failed first attempt by jax itself would cost a second of back-off."""
    end = time.monotonic() + _GRACE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((processes.host, processes.port), timeout=1.0):
            return
        time.sleep(0.02)


def _send(connection: socket.socket, said: dict[str, Any]) -> None:
    connection.sendall(json.dumps(said).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Read one line of JSON.

    Raises:
        ValueError: it is not JSON, or too long.
    """
    said = b""
    while not said.endswith(b"\n"):
        part = connection.recv(1 << 16)
        if not part:
            raise ConnectionResetError(0, "it closed the connection")
        said += part
        if len(said) > _MOST_BYTES:
            raise ValueError
    return json.loads(said)
