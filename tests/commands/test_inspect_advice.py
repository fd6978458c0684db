"""Every fix that a diagnosis proposes differs from what is set, is a config that runs, and is better."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trellax.configs import check_run, load_config
from trellax.configs.layout import layout_of, question_of
from trellax.meshes import TrellaxError
from trellax.meshes.spec import SHARDS
from trellax.plan.diagnoses import diagnose
from trellax.plan.machines.topology import read_topology
from trellax.plan.training_search import price_layout

SMALLER = {"out-of-memory", "over-xla-limit", "remat-would-save"}
MACHINES = ("h100x8", "h100x16/4", "a100-pciex8", "l40sx8", "h100x32/8", "h200x12/6")


def check_advice(name: str, words: list[str], machine: str) -> set[str]:
    """Hold every diagnosis of a config against the config that follows its advice; return what was found."""
    config, num_devices = load_config(name, words), read_topology(machine).num_devices
    check_run(config, num_devices=num_devices)
    question = question_of(config, topology=read_topology(machine))
    plan = price_layout(question, layout_of(config, num_devices=num_devices))
    found = diagnose(question, plan)
    for one in found:
        assert bool(one.change) == one.fix.startswith("set "), one
        if not one.change:
            continue
        for key, value in one.change.items():
            section, name_of_key = key.split(".")
            # What nothing reads without a pipe may be said again with one.
            is_read = config.mesh.pipe > 1 or key not in ("pipeline.chunks", "pipeline.layers_per_stage")
            assert str(value) != str(getattr(getattr(config, section), name_of_key)) or not is_read, one
            assert key in one.fix
        after = load_config(name, [*words, *(f"--{key}={value}" for key, value in one.change.items())])
        check_run(after, num_devices=num_devices)
        better = price_layout(question, layout_of(after, num_devices=num_devices))
        if one.name in SMALLER:
            assert better.memory.total < plan.memory.total, one
        else:
            assert better.time_s < plan.time_s, one
    return {one.name for one in found}


def draw_words(draw: st.DrawFn, machine: str) -> list[str]:
    count = read_topology(machine).num_devices
    tensor = draw(st.sampled_from([size for size in (1, 2, 4, 8) if count % size == 0]))
    pipe = draw(st.sampled_from([size for size in (1, 2, 3, 4, 8) if count // tensor % size == 0]))
    data = count // (tensor * pipe)
    microbatches = draw(st.sampled_from([1, 2, 4, 6, 8, 16, 32]))
    sequences = draw(st.sampled_from([1, 2, 4]))
    words = {
        "mesh.data": data,
        "mesh.tensor": tensor,
        "mesh.pipe": pipe,
        "pipeline.microbatches": microbatches,
        "pipeline.schedule": draw(st.sampled_from(["1f1b", "zb-h1", "interleaved-1f1b", "gpipe", "auto"])),
        "pipeline.remat": draw(st.sampled_from(["none", "dots", "full"])),
        "train.batch_size": data * microbatches * sequences,
        "train.shard": draw(st.sampled_from(SHARDS)),
        "data.seq_len": draw(st.sampled_from([256, 1024])),
    }
    chunks = draw(st.sampled_from([2, 3])) if words["pipeline.schedule"] == "interleaved-1f1b" else 1
    return [*(f"--{key}={value}" for key, value in words.items()), f"--pipeline.chunks={chunks}"]


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, list[str], str]:
    machine = draw(st.sampled_from(MACHINES))
    return draw(st.sampled_from(["gpt2-124m", "llama3-8b-8gpu"])), draw_words(draw, machine), machine


def check_run_of(run: tuple[str, list[str], str]) -> None:
    name, words, machine = run
    try:
        check_run(load_config(name, words), num_devices=read_topology(machine).num_devices)
    except TrellaxError:
        return
    check_advice(name, words, machine)


@given(run=runs())
@settings(derandomize=True, deadline=None, max_examples=25)
def test_advice_to_random_configs_differs_and_helps(run: tuple[str, list[str], str]) -> None:
    check_run_of(run)


@pytest.mark.slow
@given(run=runs())
@settings(derandomize=True, deadline=None, max_examples=200)
def test_advice_to_many_random_configs_differs_and_helps(run: tuple[str, list[str], str]) -> None:
    check_run_of(run)


# A pipeline of eight is idle half of the time with all the microbatches that its batch has: more cannot be had.
CASES = {
    "too-few-microbatches": "--mesh.pipe=8 --mesh.tensor=1 --pipeline.microbatches=32 --train.batch_size=32 "
    "--pipeline.remat=full --pipeline.schedule=gpipe --data.seq_len=1024",
    "uneven-turns": "--mesh.pipe=4 --mesh.tensor=2 --pipeline.schedule=zb-h1 --pipeline.microbatches=64 "
    "--pipeline.remat=full",
    "unbalanced-stages": "--mesh.pipe=2 --mesh.tensor=4 --pipeline.layers_per_stage=20,12",
    "out-of-memory": "--mesh.pipe=1 --mesh.tensor=1 --mesh.data=8 --pipeline.microbatches=8",
}


@pytest.mark.parametrize("name", CASES)
def test_advice_to_known_mistakes_differs_and_helps(name: str) -> None:
    found = check_advice("llama3-8b-8gpu", CASES[name].split(), "h100x8")
    assert name in found or name == "too-few-microbatches"
