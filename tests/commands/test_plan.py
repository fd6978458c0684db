"""`trellax plan`: its table, its JSON, the files it writes and its mistakes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trellax.commands.cli import main
from trellax.commands.planning import plan as plan_command
from trellax.configs import check_run, load_config
from trellax.configs.toml_file import PACKAGED_CONFIGS
from trellax.plan import Plan, ServeQuestion, TrainQuestion, read_topology, search_serving, search_train

ASK = "plan llama3-8b-8gpu --topology h100x8"

PLAN_KEYS = (
    "mesh schedule chunks microbatches remat zero step_time_s tokens_per_s mfu memory_bytes bubble_fraction "
    "traffic_bytes why"
)

MISTAKES = {
    "objective": f"{ASK} --objective speed",
    "topology": "plan llama3-8b-8gpu --topology h10x8",
    "no_topology": "plan llama3-8b-8gpu",
    "this_devices": "plan llama3-8b-8gpu --topology h100x16 --this",
    "too_large": "plan llama3-8b-8gpu --topology rtx4090x1",
    "write_serving": f"{ASK} --objective latency --write x.toml",
    "this_serving": f"{ASK} --this --objective latency",
    "no_folder": f"{ASK} --png nowhere/x.png",
    "write_folder": f"{ASK} --write /",
    "two_with_picture": f"{ASK},h200x8 --png x.png",
    "one_of_two_unknown": f"{ASK},h20x0x8",
    "mixed_objectives": f"{ASK} --objective train,latency",
    "no_watts": "plan llama3-8b-8gpu --topology tpu-v5px8 --objective train,energy",
    "two_too_small": "plan llama3-8b-8gpu --topology rtx4090x1,l40sx1",
    "no_prompt": f"{ASK} --objective latency --prompt 0",
}


def ask(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words.split()) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("objective", ["train", "memory", "latency", "throughput", "balanced"])
def test_json_has_these_keys(objective: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = json.loads(ask(f"{ASK} --objective {objective} --json", capsys))
    assert list(numbers) == ["objective", "topology", "plans", "diagnoses", "evidence"]
    assert 1 <= len(numbers["plans"]) <= 5
    for plan in numbers["plans"]:
        assert set(PLAN_KEYS.split()) <= set(plan)
        assert plan["why"].endswith(".")
        assert plan["memory_bytes"]["total"] < 80.8e9


@pytest.mark.parametrize("config", ["llama3-8b-8gpu", "quickstart"])
@pytest.mark.parametrize("objective", ["train", "memory", "latency", "throughput", "balanced"])
def test_search_from_python_agrees_with_the_command_to_the_digit(
    config: str, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads(ask(f"plan {config} --topology h100x8 --objective {objective} --json", capsys))["plans"]
    loaded, topology = load_config(config), read_topology("h100x8")
    if objective in ("train", "memory"):
        question = TrainQuestion(
            model=loaded.model,
            topology=topology,
            batch_size=loaded.train.batch_size,
            num_tokens=loaded.data.seq_len,
        )
        plans = search_train(question, objective=objective)
    else:
        plans = search_serving(ServeQuestion(model=loaded.model, topology=topology), objective=objective)
    assert json.loads(json.dumps([plan.numbers for plan in plans])) == told


def test_machines_are_compared_by_the_best_layout_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    words = "plan llama3-8b-8gpu --topology h100:8,rtx4090x1,h200x8/8"
    told = json.loads(ask(f"{words} --json", capsys))["topologies"]
    assert [one["topology"] for one in told] == ["h100:8", "rtx4090x1", "h200x8/8"]
    alone = json.loads(ask(f"{ASK} --json", capsys))["plans"][0]
    assert told[0]["plans"][0] | {"why": ""} == alone | {"why": ""}
    # Nothing fits the second one: its row is empty, and the reason follows.
    assert (told[1]["plans"], told[1]["error"][:13]) == ([], "nothing fits:")
    lines = ask(words, capsys).splitlines()
    assert [line.split()[0] for line in lines[3:6]] == ["h100:8", "rtx4090x1", "h200x8/8"]
    assert "nothing fits: 32 layers of width 4096 on rtx4090x1" in "\n".join(lines)


def test_several_objectives_are_a_front_in_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{ASK} --objective memory,gpu-hours,energy"
    plans = json.loads(ask(f"{words} --json", capsys))["plans"]
    points = [
        (plan["memory_bytes"]["total"], plan["gpu_hours_per_billion_tokens"], plan["kwh_per_billion_tokens"])
        for plan in plans
    ]
    assert points == sorted(points)
    assert [hours for _, hours, _ in points] == sorted((hours for _, hours, _ in points), reverse=True)
    assert all(kwh == pytest.approx(0.7 * hours) for _, hours, kwh in points)
    assert min(sum(plan["mesh"].values()) for plan in plans) < 8 + 2
    assert (plans[0]["why"], plans[-1]["why"]) == ("least memory.", "least device hours and energy.")
    table = [line.split() for line in ask(words, capsys).splitlines()]
    assert [row[-5] for row in table[4 : 4 + len(plans)]] == [f"{size / 1e9:.1f}" for size, _, _ in points]


def test_table_picture_and_json_have_one_number_for_a_layout(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Plan] = []
    monkeypatch.setattr(plan_command, "draw_front", lambda plans, **_: drawn.extend(plans) or b"")
    ask(f"{ASK} --png {tmp_path}/front.png", capsys)
    best = json.loads(ask(f"{ASK} --json", capsys))["plans"]
    for plan in best:
        same = [other.numbers for other in drawn if layout_numbers(other.numbers) == layout_numbers(plan)]
        assert [(one["step_time_s"], one["memory_bytes"], one["mfu"]) for one in same] == [
            (plan["step_time_s"], plan["memory_bytes"], plan["mfu"])
        ]
    rows = [line.split() for line in ask(ASK, capsys).splitlines()[4 : 4 + len(best)]]
    assert [f"{plan['step_time_s']:.3g}" in row for plan, row in zip(best, rows, strict=True)] == [True] * len(best)
    # The price of the config as a plan writes it is the plan's.
    ask(f"{ASK} --write {tmp_path}/planned.toml", capsys)
    this = json.loads(ask(f"plan {tmp_path}/planned.toml --topology h100x8 --this --json", capsys))["plans"][0]
    assert this | {"why": ""} == best[0] | {"why": ""}


def layout_numbers(plan: dict[str, Any]) -> dict[str, Any]:
    names = ("mesh", "context_attention", "schedule", "chunks", "microbatches", "remat", "shard", "offload")
    return {name: plan.get(name) for name in names}


def test_written_config_of_a_context_says_how_it_attends(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = "--model.max_tokens 131072 --data.seq_len 131072 --train.batch_size 4 --pipeline.microbatches 4"
    asked = f"plan llama3-8b-8gpu --topology h200x32 {words} --json --write {tmp_path}/long.toml"
    best = json.loads(ask(asked, capsys))["plans"][0]
    assert best["mesh"]["context"] > 1
    config = load_config(tmp_path / "long.toml")
    assert config.mesh.context == best["mesh"]["context"]
    assert config.pipeline.context_attention == best["context_attention"]
    check_run(config, num_devices=best_devices(best))


def best_devices(plan: dict[str, Any]) -> int:
    return math.prod(plan["mesh"].values())


def test_how_sure_a_plan_is_follows_the_published_rows(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(ask("plan llama3-8b-8gpu --topology h200x8 --this --json", capsys))["evidence"]
    assert told["accelerator"] == "h100"
    assert told["is_nearest_relative"]
    assert f"+-{told['error']:.1%} in the mean of {told['rows']} published rows on h100" in ask(
        "plan llama3-8b-8gpu --topology h200x8 --this", capsys
    )
    assert "No published rows are near this" in ask("plan llama3-8b-8gpu --topology mi300x:8", capsys)


def test_vocabulary_on_the_ends_is_priced_there(capsys: pytest.CaptureFixture[str]) -> None:
    split, ends = (
        json.loads(ask(f"{ASK} --this --json --mesh.pipe 4 --mesh.tensor 2 --pipeline.vocab {vocab}", capsys))["plans"][
            0
        ]
        for vocab in ("split", "ends")
    )
    # An end stage holds one of two whole tables, a rank of a split vocabulary a quarter of each.
    assert ends["memory_bytes"]["weights"] > split["memory_bytes"]["weights"]
    assert ends["bubble_fraction"] > split["bubble_fraction"]


def test_a_vocabulary_that_no_mesh_divides_is_priced_with_its_padding(capsys: pytest.CaptureFixture[str]) -> None:
    # 50257 is prime. Eight devices hold 6288 rows each of 50304, in two tables, in float32.
    words = f"{ASK} --json --this --mesh.tensor 4 --mesh.pipe 2 --pipeline.vocab split --model.vocab_size"
    weights = [
        json.loads(ask(f"{words} {size}", capsys))["plans"][0]["memory_bytes"]["weights"] for size in (50257, 50304)
    ]
    assert weights[0] == weights[1]


def test_table_gives_a_reason_for_every_plan(
    capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]
) -> None:
    golden("plan_llama3_8b.txt", ask(ASK, capsys))


def test_written_config_is_the_old_one_with_the_first_mesh(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "planned.toml"
    best = json.loads(ask(f"{ASK} --json --write {file}", capsys))["plans"][0]
    before, after = load_config("llama3-8b-8gpu"), load_config(file)
    assert after.mesh.sizes == best["mesh"]
    assert after.pipeline.microbatches == best["microbatches"]
    # Without a pipeline there is no schedule to write.
    assert best["schedule"] in ("none", after.pipeline.schedule)
    assert (after.model, after.data) == (before.model, before.data)
    assert after.train == before.train.model_copy(update={"shard": best["shard"]})
    check_run(after, num_devices=8)


def test_written_config_is_the_one_that_was_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "planned.toml"
    words = "--train.batch_size=256 --data.seq_len 512 --model.max_tokens=512 --optimizer.learning_rate 1"
    words += " --pipeline.max_in_flight 3 --pipeline.schedule auto --data.source text --data.paths a#é.txt,b.txt"
    best = json.loads(ask(f"plan quickstart --topology h100x16 {words} --json --write {file}", capsys))["plans"][0]
    before, after = load_config("quickstart", words), load_config(file)
    assert (after.model, after.data) == (before.model, before.data)
    assert after.train == before.train.model_copy(update={"shard": best["shard"]})
    assert (after.optimizer.learning_rate, after.pipeline.max_in_flight) == (1.0, 0)
    assert (after.mesh.sizes, after.run.fake_devices) == (best["mesh"], 16)
    check_run(after, num_devices=16)


def test_config_of_windows_is_written_as_any_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "configs" / "quickstart.toml").read_text().replace("\n", "\r\n")
    (tmp_path / "old.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    ask(f"plan {tmp_path}/old.toml --topology h100x8 --json --write {tmp_path}/new.toml", capsys)
    written = (tmp_path / "new.toml").read_text()
    assert "\ufeff" not in written
    assert load_config(tmp_path / "new.toml").model == load_config("quickstart").model


def test_written_config_drops_what_belongs_to_the_old_stages(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    uneven, planned = tmp_path / "uneven.toml", tmp_path / "planned.toml"
    text = (Path(PACKAGED_CONFIGS) / "llama3-8b-8gpu.toml").read_text()
    uneven.write_text(text.replace("[pipeline]", "[pipeline]\nlayers_per_stage = [20, 12]"))
    ask(f"plan {uneven} --topology h100x8 --write {planned}", capsys)
    check_run(load_config(planned), num_devices=8)


def test_comments_that_the_plan_makes_untrue_are_removed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old, planned = tmp_path / "old.toml", tmp_path / "planned.toml"
    text = (Path(PACKAGED_CONFIGS) / "llama3-8b-8gpu.toml").read_text()
    text = text.replace("tensor = 4\n", "# four of them share a switch\ntensor = 4  # half a machine\n")
    old.write_text(text.replace("seq_len = 8192", "seq_len = 8192  # what the corpus was cut for"))
    ask(f"plan {old} --topology h100x8 --write {planned}", capsys)
    written = planned.read_text()
    assert [line for line in text.splitlines() if line.startswith("#") and line in written] == []
    assert not any(words in written for words in ("share a switch", "half a machine", "2 days"))
    assert "seq_len = 8192  # what the corpus was cut for" in written
    head = written.split("\n\n")[0].splitlines()
    assert head[1] == f"# Command:  trellax train {planned}"
    assert "8 x H100-SXM5-80GB" in head[2]
    assert "predicted, not measured" in head[2]
    assert load_config(planned).mesh.num_devices == 8


def test_all_comments_of_a_changed_mesh_are_removed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    old, planned = tmp_path / "old.toml", tmp_path / "planned.toml"
    text = (Path(PACKAGED_CONFIGS) / "llama3-8b-8gpu.toml").read_text()
    mesh = (
        "# 4 x 2\n[mesh]  # 4 x 2\n# 4 x 2\ndata = 1 # 4 x 2\ntensor = 4\n  # 4 x 2\npipe = 2\n# 4 x 2\n\n# a Llama\n"
    )
    text = text.replace("[mesh]\ntensor = 4\npipe = 2\n\n", mesh).replace(
        "[pipeline]", '[pipeline]\nvocab = "split"#4 x 2'
    )
    # Editors on Windows begin files with a mark.
    old.write_text(text, encoding="utf-8-sig")
    ask(f"plan {old} --topology h100x8 --objective memory --write {planned}", capsys)
    written = planned.read_text()
    assert "4 x 2" not in written
    assert "# a Llama\n[model]" in written
    assert "--topology h100x8 --objective memory`" in written
    assert load_config(planned).pipeline.vocab == "split"


def test_config_as_it_stands_is_checked_as_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    # A width and heads that the mesh does not split: `train` refuses both, and so does the price.
    words = f"{ASK} --this --model.num_heads 30 --model.num_kv_heads 6 --model.head_size 128 --model.ffn_size 14338"
    assert main(words.split()) == 2
    told = capsys.readouterr().err
    assert "model.num_heads=30" in told
    assert "model.ffn_size=14338" in told


@pytest.mark.parametrize("mesh", ["mesh = { tensor = 4, pipe = 2 }\n", "mesh.tensor = 4\nmesh . 'pipe' = 2\n"])
def test_config_with_a_section_of_another_form_keeps_that_form(
    mesh: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    old, planned = tmp_path / "old.toml", tmp_path / "planned.toml"
    text = (Path(PACKAGED_CONFIGS) / "llama3-8b-8gpu.toml").read_text()
    old.write_text(mesh + text.replace("[mesh]\ntensor = 4\npipe = 2\n", ""))
    best = json.loads(ask(f"plan {old} --topology h100x8 --json --write {planned}", capsys))["plans"][0]
    assert load_config(planned).mesh.sizes == best["mesh"]
    assert "[mesh]" not in planned.read_text()


def test_config_as_it_stands_is_priced_with_its_diagnoses(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = json.loads(ask("plan llama3-8b-8gpu --topology a100-pciex8 --this --json", capsys))
    (plan,) = numbers["plans"]
    assert plan["mesh"] == load_config("llama3-8b-8gpu").mesh.sizes
    assert "tensor-over-pcie" in {diagnosis["name"] for diagnosis in numbers["diagnoses"]}


def test_training_in_eight_bits_is_priced_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for matmuls in ("plain", "fp8"):
        numbers = json.loads(ask(f"{ASK} --objective train --model.matmuls {matmuls} --json", capsys))
        assert "priced-as-bfloat16" not in {one["name"] for one in numbers["diagnoses"]}
        times.append(numbers["plans"][0]["step_time_s"])
    assert 0.5 < times[1] / times[0] < 1


def test_serving_in_eight_bits_says_what_it_is_priced_as(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{ASK} --objective latency"
    assert "priced" not in ask(words, capsys)
    assert "warning: model.matmuls='fp8' is priced as bfloat16" in ask(f"{words} --model.matmuls fp8", capsys)
    numbers = json.loads(ask(f"{words} --model.matmuls fp8 --json", capsys))
    assert "priced-as-bfloat16" in {one["name"] for one in numbers["diagnoses"]}


@pytest.mark.parametrize("objective", ["train", "throughput"])
def test_picture_is_a_png(objective: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "front.png"
    ask(f"{ASK} --objective {objective} --png {file}", capsys)
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_reported(name: str, capsys: pytest.CaptureFixture[str], golden: Callable[[str, str], None]) -> None:
    assert main(MISTAKES[name].split()) == 2
    golden(f"errors/commands/plan_command_{name}.txt", capsys.readouterr().err)
