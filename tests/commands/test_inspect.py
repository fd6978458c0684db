"""`trellax inspect`: its report, its JSON, its files and its mistakes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from trellax.commands.cli import main
from trellax.commands.inspect_advice import list_memory_savings
from trellax.configs import RunConfig, load_config
from trellax.layers import Remat, activation_bytes
from trellax.meshes import MeshSpec
from trellax.plan import StepSizes
from trellax.programs import Memory

SMALL = "inspect tiny-dense --mesh.data 2 --mesh.tensor 2 --mesh.pipe 2 --pipeline.microbatches 4"

KEYS = {
    "": "target devices memory_bytes fits verdict traffic flops model_flops recompute_flops roofline exposed "
    "step_time_s synchronous recomputed bubble_fraction hlo_instructions compile_s",
    "memory_bytes": "parameters gradients optimizer activations temporary total capacity limit host",
    "flops": "matrix vector",
    "roofline": "matrix vector communication control",
}

MISTAKES = {
    "target": f"{SMALL} --target h200=8",
    "devices": f"{SMALL} --target cpu:16",
    "open_axis": "inspect tiny-dense --mesh.data -1",
    "no_folder": f"{SMALL} --png nowhere/x.png",
    "hlo_folder": f"{SMALL} --hlo /",
    "does_not_shard": f"{SMALL} --mesh.tensor 3 --mesh.data 1",
    "slots_without_serve": f"{SMALL} --slots 8",
    "context_of_a_server": f"{SMALL} --serve --max-tokens 16 --context 17",
    "picture_of_a_server": f"{SMALL} --serve --png server.png",
    "weights_of_a_server": f"{SMALL} --serve --weights int4",
}


def test_report_is_json_with_these_keys_and_files_are_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hlo, png = tmp_path / "step.hlo", tmp_path / "step.png"
    assert main([*SMALL.split(), "--json", "--hlo", str(hlo), "--png", str(png)]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    for part, keys in KEYS.items():
        assert list(report[part] if part else report) == keys.split()
    assert set(report["traffic"][0]) == {"axis", "kind", "count", "bytes", "minimum_bytes", "ratio"}
    assert (report["devices"], report["fits"], report["bubble_fraction"]) == (8, True, pytest.approx(0.2))
    assert sum(report["roofline"].values()) == pytest.approx(1)
    assert hlo.read_text().startswith("HloModule jit_step")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "wrote" in err


def test_report_is_a_text_with_three_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL.split()) == 0
    out = capsys.readouterr().out
    for words in ("target    cpu: 8 devices", "bubble 20.0%", "memory per device", "sent per device and step", "fits:"):
        assert words in out


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_ends_with_exit_code_2_and_a_way_out(
    name: str, golden: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(MISTAKES[name].split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    golden(f"errors/commands/cli_inspect_{name}.txt", err)


def savings_of(config: RunConfig, **memory: int) -> dict[str, int]:
    mesh = config.mesh
    sizes = StepSizes(
        model=config.model,
        mesh=mesh,
        num_microbatches=config.pipeline.microbatches,
        num_sequences=config.train.batch_size // (config.pipeline.microbatches * mesh.data),
        num_tokens=config.data.seq_len,
    )
    held = {"parameters": 0, "gradients": 0, "optimizer": 0, "activations": 0, "temporary": 0} | memory
    report = Memory(**held, total=sum(held.values()), capacity=None)
    savings = list_memory_savings(config, mesh=mesh, sizes=sizes, memory=report)
    return {saving.overrides: saving.saved_bytes for saving in savings}


LARGE = "--mesh.data 4 --mesh.pipe 2 --pipeline.microbatches 4 --train.batch_size 64 --model.num_layers 8"
LARGE += " --pipeline.vocab ends"


def test_zero_saves_most_of_the_optimizer_state() -> None:
    savings = savings_of(load_config("tiny-dense", LARGE), optimizer=1000)
    assert savings["--train.shard optimizer"] == 750
    assert "--train.shard optimizer" not in savings_of(
        load_config("tiny-dense", f"{LARGE} --train.shard optimizer"), optimizer=1
    )


def test_offload_saves_the_whole_optimizer_state() -> None:
    config = load_config("tiny-dense", LARGE)
    assert savings_of(config, optimizer=1000)["--train.offload optimizer"] == 1000
    # GPipe's 4 microbatches in flight become 2.
    config = load_config("tiny-dense", f"{LARGE} --pipeline.schedule gpipe")
    assert savings_of(config, activations=1000)["--train.offload residuals"] == 500
    assert "--train.offload residuals" not in savings_of(load_config("tiny-dense", LARGE), activations=1000)
    changed = load_config("tiny-dense", f"{LARGE} --train.offload optimizer")
    assert "--train.offload optimizer" not in savings_of(changed, optimizer=8, activations=1000)


def test_more_microbatches_halve_the_activations_of_a_pipeline() -> None:
    # 1F1B on two ranks holds two microbatches, whatever their number.
    assert savings_of(load_config("tiny-dense", LARGE), activations=1000)["--pipeline.microbatches 8"] == 500


def test_savings_come_most_effective_first_and_only_where_the_config_allows_them() -> None:
    savings = savings_of(load_config("tiny-dense", f"{LARGE} --model.num_heads 1"), activations=1000, optimizer=100)
    assert list(savings.values()) == sorted(savings.values(), reverse=True)
    assert not any("tensor" in overrides for overrides in savings)


def test_rematerialisation_saves_what_layers_keep() -> None:
    config = load_config("tiny-dense", f"{LARGE} --pipeline.remat none")
    savings = savings_of(config, activations=1000)

    def kept(remat: Remat) -> int:
        return activation_bytes(config.model, num_sequences=4, num_tokens=config.data.seq_len, remat=remat).layer

    for remat in ("dots", "full"):
        assert savings[f"--pipeline.remat {remat}"] == 1000 - 1000 * kept(remat) // kept("none")
    assert "--pipeline.remat dots" not in savings_of(load_config("tiny-dense", LARGE), activations=1000)


def test_a_mesh_of_fewer_data_shards_keeps_the_number_of_devices() -> None:
    config = load_config("tiny-dense", LARGE)
    assert config.mesh == MeshSpec(data=4, pipe=2)
    assert "--mesh.tensor 2 --mesh.data 2" in savings_of(config, parameters=1000)
