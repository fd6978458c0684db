"""A run whose sections contradict each other is refused before any array is made."""

from collections.abc import Callable

import pytest
from trellax.configs.check import check_run
from trellax.configs.run_config import load_config
from trellax.meshes import MeshSpec, TrellaxError

SCHEDULES = ["naive", "gpipe", "1f1b", "interleaved-1f1b", "zb-v", "v-half"]

MISTAKES = {
    "mesh_too_large": "--mesh.data=3 --mesh.tensor=4 --train.batch_size=12",
    "mesh_leaves_no_whole_number": "--mesh.data=-1 --mesh.tensor=4 --mesh.pipe=4",
    "heads_over_tensor": "--mesh.data=1 --mesh.tensor=8 --model.ffn_size=128",
    "ffn_over_tensor": "--mesh.data=2 --mesh.tensor=4 --model.ffn_size=126",
    "kv_heads_over_tensor": "--mesh.tensor=4 --mesh.data=2 --model.num_heads=12 --model.num_kv_heads=6",
    "fewer_layers_than_stages": "--mesh.pipe=4 --mesh.data=2",
    "layers_lost": "--mesh.pipe=2 --mesh.data=4 --model.num_layers=6 --pipeline.layers_per_stage=3,2",
    "layers_of_other_stages": "--mesh.pipe=2 --mesh.data=4 --model.num_layers=6 --pipeline.layers_per_stage=2,2,2",
    "stage_without_layers": "--mesh.pipe=2 --mesh.data=4 --pipeline.layers_per_stage=2,0",
    "batch_over_data_and_microbatches": "--mesh.data=8 --pipeline.microbatches=3",
    "layers_of_no_stages": "--mesh.data=8 --pipeline.layers_per_stage=7,7,7",
    "limit_of_1f1b": "--mesh.data=8 --pipeline.max_in_flight=2",
    "no_file_of_one_rank": "--mesh.data=8 --pipeline.schedule=nowhere/x.csv",
    "nothing_to_keep": "--mesh.data=8 --checkpoint.keep_every=10",
    "one_chunk_of_a_v": "--mesh.pipe=2 --mesh.data=4 --pipeline.schedule=v-half",
    "three_chunks_of_a_v": "--mesh.pipe=2 --mesh.data=4 --pipeline.schedule=zb-v --pipeline.chunks=3",
    "one_chunk_interleaved": "--mesh.pipe=2 --mesh.data=4 --pipeline.schedule=interleaved-1f1b",
    "unknown_schedule": "--mesh.data=8 --pipeline.schedule=1b1f",
    "sequence_too_long": "--mesh.data=8 --data.seq_len=64",
    "warmup_too_long": "--mesh.data=8 --optimizer.warmup_steps=21",
    "decay_of_a_cosine": "--mesh.data=8 --optimizer.decay_steps=3",
    "decay_too_long": "--mesh.data=8 --optimizer.lr_schedule=wsd --optimizer.decay_steps=19",
    "rate_of_no_name": "--mesh.data=8 --optimizer.lr_schedule=polinomial_schedule(1,0.1,2,10)",
    "rate_without_arguments": "--mesh.data=8 --optimizer.lr_schedule=exponential_decay",
    "rate_of_another_argument": "--mesh.data=8 --optimizer.lr_schedule=linear_schedule(1,end=0.1,transition_steps=9)",
    "rate_of_too_few": "--mesh.data=8 --optimizer.lr_schedule=linear_schedule(1.0)",
    "rate_of_a_name_as_value": "--mesh.data=8 --optimizer.lr_schedule=constant_schedule(peak)",
    "rate_that_optax_refuses": "--mesh.data=8 --optimizer.lr_schedule=cosine_decay_schedule(1,-5)",
    "rate_that_is_no_call": "--mesh.data=8 --optimizer.lr_schedule=cos(",
    "weights_of_no_paths": "--mesh.data=8 --data.weights=1,2",
    "vocab_below_bytes": "--mesh.data=8 --model.vocab_size=128",
    "text_without_paths": "--mesh.data=8 --data.source=text",
    "tokens_without_paths": "--mesh.data=8 --data.source=tokens",
    "stdlib_with_paths": "--mesh.data=8 --data.paths=a.txt",
    "tokens_over_context": "--mesh.data=1 --mesh.context=8 --data.seq_len=24",
    "tokens_over_context_and_tensor": "--mesh.context=2 --mesh.tensor=4 --data.seq_len=20 --mesh.sequence=on",
    "experts_of_a_dense_model": "--mesh.data=2 --mesh.expert=2 --mesh.context_expert=2",
    "experts_over_data_and_context": "--mesh.data=1 --mesh.expert=2 --mesh.context_expert=4 --model.num_experts=4 "
    "--model.experts_per_token=2",
    "tokens_over_both_axes": "--mesh.context=2 --mesh.context_expert=4 --data.seq_len=24 --model.num_experts=4 "
    "--model.experts_per_token=2",
    "heads_over_context": "--mesh.data=1 --mesh.context=8 --pipeline.context_attention=ulysses",
    "packed_ids_without_an_end": "--mesh.data=8 --data.source=tokens --data.packing=on --data.paths=README.md",
    "end_of_bytes": "--mesh.data=8 --data.packing=on --data.end_id=10",
    "end_that_is_no_id": "--mesh.data=8 --data.source=tokens --data.packing=on --data.end_id=999 --data.paths=a.bin",
    "many_at_once": "--mesh.pipe=3 --pipeline.schedule=gpip --data.seq_len=64 --train.batch_size=7",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_contradiction_is_reported_with_its_numbers(name: str, golden: Callable[[str, str], None]) -> None:
    config = load_config("tiny-dense", [*MISTAKES[name].split(), "--model.head_size=8"])
    with pytest.raises(TrellaxError) as caught:
        check_run(config, num_devices=8, known_schedules=SCHEDULES)
    golden(f"errors/configs/check_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_fitting_run_gets_its_mesh_filled_in() -> None:
    config = load_config("quickstart", ["--mesh.data=-1"])
    assert check_run(config, num_devices=8, known_schedules=SCHEDULES) == MeshSpec(data=2, tensor=2, pipe=2)


@pytest.mark.parametrize(
    "words",
    [
        "--mesh.pipe=2 --model.num_layers=3",
        "--mesh.pipe=2 --model.num_layers=3 --pipeline.layers_per_stage=2,1",
        "--mesh.pipe=2 --pipeline.chunks=2 --pipeline.schedule=auto --model.num_layers=5",
        "--mesh.pipe=2 --pipeline.chunks=2 --pipeline.schedule=v-min --model.num_layers=5",
        # One rank has all layers, and a file of one's own says its chunks when it is read.
        "--pipeline.layers_per_stage=1,1 --pipeline.chunks=4",
        "--mesh.pipe=2 --model.num_layers=4 --pipeline.layers_per_stage=1,1,1,1 --pipeline.schedule=my.csv",
    ],
)
def test_stages_need_not_be_equal(words: str) -> None:
    config = load_config("tiny-dense", words)
    assert check_run(config, num_devices=config.mesh.pipe * config.mesh.tensor) == config.mesh


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_kv_heads_may_be_split_or_copied(tensor: int) -> None:
    config = load_config("tiny-llama", [f"--mesh.tensor={tensor}"])
    assert check_run(config, num_devices=tensor, known_schedules=SCHEDULES).tensor == tensor


def test_large_configs_fit_the_hardware_they_name() -> None:
    assert check_run(load_config("gpt2-124m"), num_devices=1, known_schedules=SCHEDULES).data == 1
    assert check_run(load_config("llama3-8b-8gpu"), num_devices=8, known_schedules=SCHEDULES).num_devices == 8


def test_schedules_of_trellax_are_known_without_naming_them() -> None:
    assert check_run(load_config("tiny-dense"), num_devices=1) == MeshSpec()
