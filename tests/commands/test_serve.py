"""`trellax serve` as a process: what it prints, how it ends, and mistakes before weights are read."""

import argparse
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from trellax.commands.arguments.serve import add_serve_arguments
from trellax.commands.cli import main
from trellax.commands.serve import collect_serve_settings
from trellax.configs import load_config
from trellax.hub.saves.reader import SaveReader
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import param_shapes
from trellax.train.checkpoints.initial_weights import save_params

ROOT = Path(__file__).parents[2]
LONG = {"model": "tiny", "prompt": "Hi", "max_tokens": 2_000, "temperature": 0, "stream": True}
LONG |= {"stream_options": {"include_usage": True}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a tiny Llama with drawn weights, whose answers may be long."""
    config = load_config("tiny-llama", ["--model.max_tokens", "2048"])
    rng = np.random.default_rng(0)
    shapes = param_shapes(config.model, mesh=build_mesh(MeshSpec(), devices=jax.devices()[:1]))
    params = jax.tree.map(lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype("float32")), shapes)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    save_params(folder, params, config)
    return folder


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, str]) -> None:
        self.process, self.ready = process, ready
        self.host = ready["url"].removeprefix("http://")

    def open(self, path: str, body: Any = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        headers = {"Content-Type": "application/json", "Authorization": "Bearer secret", "Connection": "close"}
        connection.request("GET" if body is None else "POST", path, body=body and json.dumps(body), headers=headers)
        return connection.getresponse()


@contextmanager
def running(folder: Path, *words: str) -> Iterator[Process]:
    env = os.environ | {
        "PYTHONPATH": f"{ROOT / '.src'}:{os.environ.get('PYTHONPATH', '')}",
        "TRELLAX_API_KEY": "secret",
    }
    command = [sys.executable, "-m", "trellax", "serve", str(folder), "--port", "0", "--json", *words]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Process(process, json.loads(process.stdout.readline() or "null"))
        finally:
            process.kill()


def test_sigterm_ends_what_was_begun_and_refuses_what_is_new(run_folder: Path) -> None:
    with running(run_folder) as server:
        assert server.ready == {"url": f"http://{server.host}", "api": f"http://{server.host}/v1", "model": "tiny"}
        assert server.host.startswith("127.0.0.1:")
        stream = server.open("/v1/completions", LONG)
        assert stream.readline().startswith(b"data: {")
        server.process.send_signal(signal.SIGTERM)
        refused = server.open("/v1/completions", LONG)
        assert (refused.status, refused.getheader("retry-after")) == (503, "1")
        assert "the server is stopping" in json.load(refused)["error"]["message"]
        *_, usage, done, _ = stream.read().decode().split("\n\n")
        assert done == "data: [DONE]"
        assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 2_000
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out) == (0, "")
        assert err.splitlines()[-1] == "stopped"
        assert "warning   the model has no chat template" in err
        assert "Traceback" not in err


@pytest.mark.slow
def test_second_signal_ends_the_rest_too(run_folder: Path) -> None:
    with running(run_folder) as server:
        with server.open("/v1/completions", LONG) as stream:
            assert stream.readline().startswith(b"data: {")
            server.process.send_signal(signal.SIGINT)
            with server.open("/health") as health:
                assert json.load(health) == {"status": "stopping"}
            server.process.send_signal(signal.SIGINT)
            events = stream.read()
        assert b"the answer was cancelled: the server has stopped" in events
        assert b"[DONE]" not in events
        out, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, out) == (0, "")
        assert "Traceback" not in err


MISTAKES: dict[str, list[str]] = {
    "port": ["--port", "70000"],
    "api_key": ["--api-key", "a key"],
    "template": ["--chat-template", "no-such-file.jinja"],
    "heads_over_tensor": ["--mesh", "tensor=3"],
    "slots_over_groups": ["--mesh", "pipe=2", "--slots", "3"],
    "longer_than_the_model": ["--max-tokens", "4096"],
    "timeout": ["--timeout", "nan"],
    "body": ["--max-body-bytes", "0"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_before_weights_are_read(
    name: str,
    run_folder: Path,
    golden: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SaveReader, "read", lambda *args: pytest.fail("read"))
    assert main(["serve", str(run_folder), *MISTAKES[name]]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/serve_{name}.txt", err.replace(str(run_folder), "FOLDER"))


def test_port_that_is_taken_is_reported(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run_folder), "--port", str(port)]) == 2
    assert f"--host '127.0.0.1' --port {port} cannot be bound: " in capsys.readouterr().err


def test_missing_extra_is_named(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["serve", str(run_folder)]) == 2
    assert "pip install 'trellax[serve]'" in capsys.readouterr().err


def test_processes_compare_the_files_of_all_models_that_they_load(tmp_path: Path) -> None:
    """Those of a draft model, and of what adapters adapt; a path may differ where the files are the same."""
    for name in ("model", "base", "adapters", "draft", "same", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("other" if name == "other" else "some")
    peft = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapters" / "adapter_config.json").write_text(
        json.dumps(peft | {"base_model_name_or_path": str(tmp_path / "base")})
    )

    def facts(folder: str, *words: str) -> dict[str, str]:
        parser = argparse.ArgumentParser()
        add_serve_arguments(parser)
        return collect_serve_settings(parser.parse_args([str(tmp_path / folder), *words]))

    drafts = [facts("model", "--speculate", str(tmp_path / name)) for name in ("draft", "same", "other")]
    assert drafts[0] == drafts[1]
    assert {name for name in drafts[0] if drafts[0][name] != drafts[2][name]} == {"draft model"}
    assert {name for name, said in facts("model").items() if said != drafts[0][name]} == {"--speculate", "draft model"}
    before = facts("adapters")
    (tmp_path / "base" / "weights").write_text("others")
    assert {name for name, said in facts("adapters").items() if said != before[name]} == {"model"}
