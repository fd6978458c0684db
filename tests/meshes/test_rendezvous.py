"""Processes meet before jax connects them: who is missing, who is otherwise, who sits on the port."""

import socket
import threading
from collections.abc import Callable, Sequence

import pytest
from trellax.meshes import LostProcessError, MeshError, RunError, TrellaxError
from trellax.meshes.processes.launchers import Processes
from trellax.meshes.processes.rendezvous import meet

Golden = Callable[[str, str], None]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def outcomes(
    who: Sequence[tuple[int, int, dict[str, str]]],
    *,
    start_s: float = 20,
    port: int | None = None,
    before_last: Callable[[], None] = lambda: None,
) -> list[TrellaxError | None]:
    """Let processes (count, index, facts) meet, each in a thread, and return what each of them raised."""
    port = port or free_port()
    found: list[TrellaxError | None] = [None] * len(who)

    def attend(number: int) -> None:
        count, index, facts = who[number]
        processes = Processes(coordinator=f"127.0.0.1:{port}", count=count, index=index)
        try:
            meet(processes, facts=facts, start_s=start_s)
            if index == 0:
                # As jax does; the others wait for it.
                servers.append(socket.create_server(("127.0.0.1", port)))
        except TrellaxError as error:
            found[number] = error

    servers: list[socket.socket] = []
    threads = [threading.Thread(target=attend, args=(number,)) for number in range(len(who))]
    for thread in threads[:-1]:
        thread.start()
    before_last()
    threads[-1].start()
    for thread in threads:
        thread.join()
    for server in servers:
        server.close()
    return found


def test_processes_that_agree_go_on() -> None:
    assert outcomes([(3, 2, {"a": "1"}), (3, 0, {"a": "1"}), (3, 1, {"a": "1"})]) == [None, None, None]


def test_process_that_differs_ends_all_with_the_same_error(golden: Golden) -> None:
    found = outcomes([(3, 0, {"steps": "1"}), (3, 1, {"steps": "2"}), (3, 2, {"steps": "1"})])
    assert {type(error) for error in found} == {RunError}
    assert len({str(error) for error in found}) == 1
    golden("errors/meshes/processes_differ.txt", f"RunError: {found[0]}")


def test_other_number_of_processes_is_a_difference() -> None:
    for error in outcomes([(2, 0, {}), (3, 1, {}), (3, 2, {})]):
        assert "processes 1 and 2 have --num-processes=3, process 0 has 2" in str(error)


def test_duplicate_process_id_is_reported() -> None:
    for error in outcomes([(3, 0, {}), (3, 1, {}), (3, 1, {})]):
        assert "--process-id 1 is given to 2 processes" in str(error)


def test_process_that_does_not_come_is_named_to_all_in_time(golden: Golden) -> None:
    port = free_port()
    found = outcomes([(3, 0, {}), (3, 2, {})], start_s=0.4, port=port)
    assert {type(error) for error in found} == {LostProcessError}
    golden("errors/meshes/processes_missing.txt", f"LostProcessError: {found[1]}".replace(str(port), "PORT"))


def test_first_process_that_does_not_come_is_named() -> None:
    (error,) = outcomes([(2, 1, {})], start_s=0.3)
    assert isinstance(error, LostProcessError)
    assert "process 0 of 2 has not answered at" in str(error)
    assert "Connection refused" in str(error)


def test_port_that_something_listens_on_is_refused(golden: Golden) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        (error,) = outcomes([(2, 0, {})], port=port)
    assert isinstance(error, MeshError)
    golden("errors/meshes/processes_port_taken.txt", f"MeshError: {error}".replace(str(port), "PORT"))


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n\r\n\n", b'{"index": 1}\n', b"[]\n", b""])
def test_connections_of_other_programs_are_closed(words: bytes) -> None:
    port = free_port()

    def knock() -> None:
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), 5) as stranger:
                    stranger.sendall(words)
                    return
            except ConnectionRefusedError:
                continue

    assert outcomes([(2, 0, {}), (2, 1, {})], port=port, before_last=knock) == [None, None]
