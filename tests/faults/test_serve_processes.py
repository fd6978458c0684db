"""A server of several processes on one machine: the answers of one process, and a lost process ends all by name."""

import importlib.util
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from .test_processes import LOST
from .zygote import Child, Zygote

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ASKED: list[dict[str, Any]] = [
    {"prompt": [1, 2, 3], "max_tokens": 12, "temperature": 0},
    {"prompt": [7] * 9, "max_tokens": 20, "temperature": 0.9, "seed": 3, "n": 3},
    {"prompt": [[5, 6], [1, 2, 3, 4]], "max_tokens": 9, "temperature": 0.5, "seed": 1, "presence_penalty": 1.5},
    {"prompt": [9, 8], "max_tokens": 6, "temperature": 0, "logprobs": 2, "logit_bias": {"65": 4}},
]
if importlib.util.find_spec("llguidance"):
    ASKED.append(
        {"prompt": [4, 2], "max_tokens": 20, "temperature": 1, "seed": 5, "guided_regex": "[a-f]{3,8}", "n": 2}
    )


@pytest.fixture(scope="module")
def model(zygote: Zygote, tiny_words: str, folder: Path) -> Path:
    code, child = zygote.run(f"{tiny_words} --train.steps 2 --run.name served --fake-devices 1", seconds=300)
    assert code == 0, child.said()
    return folder / "served"


def start(zygote: Zygote, model: Path, mesh: str, *, devices: int, count: int) -> list[Child]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"serve {model} --mesh {mesh} --fake-devices {devices} --port 0 --json --silence 6"
    if count == 1:
        return [zygote.start(words)]
    joined = f"{words} --coordinator 127.0.0.1:{port} --num-processes {count}"
    return [zygote.start(f"{joined} --process-id {index}") for index in range(count)]


def url_of(child: Child) -> str:
    end = time.monotonic() + 500
    while not (said := child.out.read_text() if child.out.exists() else "").endswith("\n"):
        assert time.monotonic() < end, child.said()
        time.sleep(0.1)
    return json.loads(said)["api"]


def ask(api: str, body: dict[str, Any]) -> tuple[int, Any]:
    sent = json.dumps({"model": "served", **body}).encode()
    request = urllib.request.Request(f"{api}/completions", sent, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, json.load(response)["choices"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


@pytest.mark.parametrize(("mesh", "count"), [("data=2", 2), ("tensor=2,pipe=2", 4)])
def test_answers_are_those_of_one_process_and_a_lost_one_ends_all(
    mesh: str, count: int, zygote: Zygote, model: Path
) -> None:
    alone = start(zygote, model, mesh, devices=count, count=1)
    api = url_of(alone[0])
    expected = [ask(api, body) for body in ASKED]
    alone[0].kill(signal.SIGTERM)
    assert zygote.wait(alone[0]) == 0

    served = start(zygote, model, mesh, devices=count, count=count)
    api = url_of(served[0])
    for (status, choices), (one_status, one_choices) in zip([ask(api, b) for b in ASKED], expected, strict=True):
        assert (status, one_status) == (200, 200)
        # Between processes gloo sums in another order, so log probabilities agree to 1e-5 and texts are equal.
        assert [one["text"] for one in choices] == [one["text"] for one in one_choices]
    assert [child.out.read_text() for child in served[1:]] == [""] * (count - 1)

    served[-1].kill()
    zygote.wait(served[-1])
    answers: list[tuple[int, Any]] = []
    client = threading.Thread(target=lambda: answers.append(ask(api, ASKED[0])))
    client.start()
    end = time.monotonic() + 60
    codes = [zygote.wait(child, seconds=end - time.monotonic()) for child in served[:-1]]
    client.join()
    name = f"process {count - 1} of {count} "
    assert codes == [LOST] * (count - 1)
    assert all(name in child.said() for child in served[:-1])
    assert all("start the server again" in child.said() for child in served[:-1])
    assert not any("saved" in child.said() for child in served[:-1])
    assert answers[0][0] == 503
    assert name in answers[0][1]


def test_a_signal_to_all_ends_what_was_begun(zygote: Zygote, model: Path) -> None:
    served = start(zygote, model, "data=2", devices=2, count=2)
    api = url_of(served[0])
    answers: list[tuple[int, Any]] = []
    clients = [threading.Thread(target=lambda: answers.append(ask(api, ASKED[1]))) for _ in range(3)]
    for client in clients:
        client.start()
    for child in reversed(served):
        child.kill(signal.SIGTERM)
    assert [zygote.wait(child) for child in served] == [0, 0], served[1].said()
    for client in clients:
        client.join()
    # Those that came too late are refused, and none is cut off.
    assert {status for status, _ in answers} <= {200, 503}


def test_settings_that_differ_are_named(zygote: Zygote, model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"serve {model} --mesh data=2 --fake-devices 2 --coordinator 127.0.0.1:{port} --num-processes 2"
    both = [zygote.start(f"{words} --process-id {index} --slots {2 + 2 * index}") for index in range(2)]
    assert [zygote.wait(child) for child in both] == [2, 2]
    assert "process 1 has --slots=4, process 0 has 2" in both[0].said()
