"""`trellax bench-decode`: a row for each mesh and batch, a picture, and refusals before anything is allocated."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from trellax.commands import bench_decode as bench_decode_command
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.layers import param_counts
from trellax.meshes import MeshSpec, build_mesh
from trellax.serve import Engine, Sizes
from trellax.serve.measure import DecodeTimes, read_bytes
from trellax.serve.state import state_shapes

SMALL = ["bench-decode", "tiny-llama", "--prompt-tokens", "8", "--new-tokens", "8", "--fake-devices", "8"]


def test_rows_have_latency_throughput_idle_share_and_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch", "1", "--meshes", "data=1;pipe=2", "--json", "--png", str(tmp_path / "curve.png")]
    assert main([*SMALL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["rows"]
    assert (one["mesh"], two["mesh"]) == ("data=1 tensor=1 pipe=1", "data=1 tensor=1 pipe=2")
    for row in (one, two):
        assert row["first_token_s"] > 0 < row["per_token_s"]
        assert row["tokens_per_s"] > 0 < row["roofline_share"]
    # One request can be in one of two stages.
    assert one["idle_share"] == 0
    assert two["idle_share"] >= 0.5
    assert "copy on this machine" in found["memory"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = DecodeTimes(first_token_s=0.25, per_token_s=0.01, tokens_per_s=1234.5, idle_share=0.5, read_bytes=1e6)
    monkeypatch.setattr(bench_decode_command, "measure_decode", lambda *args, **kwargs: times)
    for name in ("Engine", "draw_params"):
        monkeypatch.setattr(bench_decode_command, name, lambda *args, **kwargs: None)
    assert main([*SMALL, "--batch", "2,4", "--meshes", "tensor=2"]) == 0
    head, names, *rows, memory = capsys.readouterr().out.splitlines()
    assert head == "8 tokens read and 8 written for each request"
    assert names.split()[:2] == ["mesh", "requests"]
    assert [row.split()[:7] for row in rows] == [
        ["data=1", "tensor=2", "pipe=1", batch, "250.0", "10.00", "1,234.5"] for batch in ("2", "4")
    ]
    assert memory.startswith("memory: ")


MISTAKES = {
    "does_not_fit": "llama3-70b-64gpu --meshes tensor=8 --batch 1",
    "batch_is_no_number": "tiny-llama --batch few",
    "one_new_token": "tiny-llama --new-tokens 1",
    "too_long": "tiny-llama --prompt-tokens 30 --new-tokens 30",
    "no_mesh": "tiny-llama --meshes ;",
    "no_folder": "tiny-llama --png nowhere/x.png",
    "layers_over_pipe": "tiny-llama --meshes pipe=4 --prompt-tokens 4 --new-tokens 4",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported_before_anything_is_allocated(
    name: str,
    golden: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_decode_command, "draw_params", lambda *args: pytest.fail("drawn"))
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_AVPHYS_PAGES": 2**21, "SC_PAGE_SIZE": 4096}[name])
    assert main(["bench-decode", *MISTAKES[name].split(), "--fake-devices", "8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/bench_decode_{name}.txt", err)


def test_bytes_of_a_token_are_weights_and_what_is_cached() -> None:
    config, spec = load_config("tiny-llama").model, MeshSpec()
    mesh = build_mesh(spec, devices=jax.devices()[:1])
    engine = object.__new__(Engine)
    engine.config, engine.mesh, engine.spec, engine.weights = config, mesh, spec, "plain"
    engine.cache_dtype = "bfloat16"
    engine.sizes = Sizes(slots=4, max_tokens=32, groups=1, num_shards=1, chunk=4, items=1, rounds=1)
    engine.shapes = state_shapes(config, engine.sizes, mesh=mesh, cache_dtype="bfloat16")
    counts = param_counts(config)
    weights = 4 * (2 * counts.block + config.vocab_size * config.hidden_size)
    cached = 2 * 2 * 3 * 10 * config.kv_size * 2  # keys and values, layers, rows, tokens, features, bytes
    assert read_bytes(engine, batch=3, context=10) == weights + cached
