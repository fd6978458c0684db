"""`describe --serve` and `inspect --serve`: a server's bytes from shapes are those of its compiled programs."""

import json
from typing import Any

import pytest
from trellax.commands.cli import main

SERVED = "tiny-dense --mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --serve --slots 8"
KEYS = {
    "": "target devices rows context chunk ticks memory_bytes decode prefill least_bytes ratio token_s compile_s",
    "memory_bytes": "weights cache state temporary capacity total",
    "decode": "moved_bytes kernels collectives traffic time_s",
    "least_bytes": "weights cache",
}


def numbers(capsys: pytest.CaptureFixture[str], words: str) -> Any:
    assert main([*words.split(), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("formats", ["--weights int8 --cache-dtype fp8", "--weights fp8"])
def test_bytes_of_a_server_are_those_of_its_programs(capsys: pytest.CaptureFixture[str], formats: str) -> None:
    told = numbers(capsys, f"describe {SERVED} {formats}")
    report = numbers(capsys, f"inspect {SERVED} {formats} --chunk 4 --context 32")
    for part, keys in KEYS.items():
        assert list(report[part] if part else report) == keys.split()
    memory, decode = report["memory_bytes"], report["decode"]
    assert {name: memory[name] for name in ("weights", "cache", "state")} == {
        name: told[name] for name in ("weights", "cache", "state")
    }
    assert memory["temporary"] > 0
    assert (report["devices"], report["rows"], report["ticks"]) == (8, 2, 2)
    # One layer a stage: two all-reduces a layer, two of the head, two hops.
    assert decode["collectives"] == 2 + 2 + 2
    assert report["least_bytes"]["weights"] <= told["read_weights"]
    assert decode["moved_bytes"]["layers"] > report["least_bytes"]["weights"] / 2
    assert decode["kernels"] > 20


def test_a_server_is_described_without_being_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"describe {SERVED} --cache-dtype fp8".split()) == 0
    out = capsys.readouterr().out
    for words in (
        "mesh      data=2 tensor=2 pipe=2",
        "8 slots of",
        "cache fp8",
        "a device holds",
        "a token in the cache",
    ):
        assert words in out
