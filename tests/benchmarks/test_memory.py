"""The benchmark of planned memory: cases are configs, its file is read on, its table is what the planner says."""

import json
from pathlib import Path

import pytest
from trellax.configs.layout import layout_of

from benchmarks.memory import run
from benchmarks.memory.cases import CASES, Case
from benchmarks.memory.run import LIMIT, Row, compare, list_cases, list_kinds, planned_bytes, read_compiled, targets_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "RESULTS.md"
CASE = Case(kind="data", config="llama3-8b-8gpu", settings="data=8 tensor=1 pipe=1 shard=layer microbatches=4 seq=2048")


def test_cases_are_forty_different_configs_of_all_layouts() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40
    layouts = []
    for case in CASES:
        config = case.load()
        layouts.append(layout_of(config, num_devices=config.mesh.num_devices))
    assert {layout.shard for layout in layouts} == {"none", "optimizer", "step", "layer"}
    assert {layout.remat for layout in layouts} == {"none", "dots", "full"}
    assert {layout.schedule for layout in layouts} >= {"1f1b", "interleaved-1f1b", "zb-h1", "zb-v", "v-half", "v-min"}
    assert {layout.context for layout in layouts} == {1, 2, 4, 8}
    assert {layout.expert for layout in layouts} == {1, 2, 4, 8}
    assert {layout.offload for layout in layouts} == {"none", "optimizer", "residuals"}


def test_settings_are_words_of_a_command_line() -> None:
    words = (
        "--mesh.data 8 --mesh.tensor 1 --mesh.pipe 1 --train.shard layer --pipeline.microbatches 4 --data.seq_len 2048"
    )
    assert CASE.words == words.split()


def test_a_case_that_was_compiled_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CASES", (CASE,))
    monkeypatch.setattr(run, "compile_case", lambda case: {"case": case.name, "memory_bytes": {"total": 10**10}})
    file = tmp_path / "compiled.jsonl"
    assert run.main([str(file)]) == 1
    monkeypatch.delattr(run, "compile_case")
    assert run.main([str(file)]) == 1
    assert list(read_compiled(file)) == [CASE.name]
    file.write_text(file.read_text() + json.dumps({"case": CASE.name, "error": "no"}) + "\n")
    assert read_compiled(file)[CASE.name]["error"] == "no"


def test_a_case_without_a_number_is_a_miss_and_says_why() -> None:
    rows = [compare(CASE, {"error": "ProgramError: no"}), Row(kind="data", case="x", compiled=100, planned=98.0)]
    assert rows[0].failure == "ProgramError: no"
    assert list_cases(rows)[1:] == [(CASE.name, "-", "-", "ProgramError: no"), ("x", "0.00", "0.00", "-2.0%")]
    assert list_kinds(rows)[1:] == [("data", "2", "1", "2.0%", "-2.0%"), ("all", "2", "1", "2.0%", "-2.0%")]
    assert [(target.measured, target.is_met) for target in targets_of(rows)] == [(1, False), (38, False)]


def test_planned_bytes_in_the_results_are_the_planners() -> None:
    lines = RESULTS.read_text().partition("# The planner's memory against compiled programs")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    of_case = {case.name: case for case in CASES}
    stated = [line for line in cells if line[0] in of_case and line[1] != "-"]
    assert len(stated) >= 40
    assert not [name for name, _, _, error in stated if abs(float(error.rstrip("%"))) > 100 * LIMIT]
    for name, compiled, planned, error in stated:
        assert f"{planned_bytes(of_case[name]) / 1e9:.2f}" == planned
        assert float(planned) / float(compiled) - 1 == pytest.approx(float(error.rstrip("%")) / 100, abs=1e-3)
        assert LIMIT == 0.03
