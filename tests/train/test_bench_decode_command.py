"""`trellax bench-decode`: a row for each mesh and batch, a picture, and refusals before anything is allocated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.serve.engine import Engine
from trellax.serve.measure import read_bytes
from trellax.train import bench_decode_command
from trellax.train.cli import main

SMALL = ["bench-decode", "tiny-llama", "--prompt-tokens", "8", "--new-tokens", "8", "--fake-devices", "8"]


def test_rows_have_latency_throughput_idle_share_and_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--batch", "1,3", "--meshes", "data=1;pipe=2", "--json", "--png", str(tmp_path / "curve.png")]
    assert main([*SMALL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = found["rows"]
    assert [(row["mesh"], row["batch"]) for row in rows] == [
        ("data=1 tensor=1 pipe=1", 1),
        ("data=1 tensor=1 pipe=1", 3),
        ("data=1 tensor=1 pipe=2", 1),
        ("data=1 tensor=1 pipe=2", 3),
    ]
    assert all(row["first_token_s"] > 0 < row["per_token_s"] and row["roofline_share"] > 0 for row in rows)
    assert rows[0]["idle_share"] == 0
    # One request can be in one of two stages.
    assert rows[2]["idle_share"] >= 0.5 > rows[3]["idle_share"]
    assert "copy on this machine" in found["memory"]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_table_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--batch", "2", "--meshes", "tensor=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 tokens read and 8 written for each request"
    assert lines[1].split()[:2] == ["mesh", "requests"]
    assert lines[2].split()[:4] == ["data=1", "tensor=2", "pipe=1", "2"]
    assert lines[3].startswith("memory: ")


MISTAKES = {
    "does_not_fit": "llama3-70b-64gpu --meshes tensor=8 --batch 1",
    "batch_is_no_number": "tiny-llama --batch few",
    "one_new_token": "tiny-llama --new-tokens 1",
    "too_long": "tiny-llama --prompt-tokens 30 --new-tokens 30",
    "layers_over_pipe": "tiny-llama --meshes pipe=4 --prompt-tokens 4 --new-tokens 4",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_before_anything_is_allocated(
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
    golden(f"errors/bench_decode_{name}.txt", err)


def test_bytes_of_a_token_are_weights_and_what_is_cached() -> None:
    from tests.serve.models import mesh_of, model_of, numbers_of, params_on  # a model of known size

    config = model_of("llama")
    engine = Engine(config, params_on(config, mesh_of("data=1")), mesh=mesh_of("data=1"), slots=4)
    numbers = numbers_of(config)
    import jax

    blocks = sum(leaf.nbytes for leaf in jax.tree.leaves(numbers["blocks"]))
    cached = 2 * 4 * 3 * 10 * 2 * 4 * 4  # keys and values, layers, rows, tokens, heads, head size, bytes
    assert read_bytes(engine, batch=3, context=10) == blocks + numbers["head"]["table"].nbytes + cached
