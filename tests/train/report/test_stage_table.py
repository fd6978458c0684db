"""In the table of stages parameters add up to the model, times to 1, and activations to those that a rank holds."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from trellax.commands.cli import main
from trellax.configs import load_config
from trellax.layers import param_counts
from trellax.meshes import sharding_table
from trellax.schedules import StageCost, build_schedule, simulate
from trellax.train import Setup, draw_schedule, prepare
from trellax.train.report.stage_table import microbatches_at_peak, ranks_of_ends, tabulate_stages

FOUR = "--mesh.tensor 1 --mesh.pipe 4 --model.num_layers 7 --pipeline.microbatches 8"
V_SHAPED = "--mesh.tensor 1 --mesh.pipe 4 --model.num_layers 9 --pipeline.schedule v-half --pipeline.chunks 2"
CHUNKS = "--pipeline.schedule interleaved-1f1b --pipeline.chunks 2 --model.num_layers 7"


def setup_of(words: str = "", name: str = "quickstart") -> Setup:
    return prepare(load_config(name, words))


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
@pytest.mark.parametrize("vocab", ["split", "ends"])
@pytest.mark.parametrize("words", [FOUR, CHUNKS])
def test_parameters_add_up_to_the_model(words: str, vocab: str, embeddings: str) -> None:
    setup = setup_of(f"{words} --pipeline.vocab {vocab} --model.embeddings {embeddings}")
    rows = tabulate_stages(setup).rows
    assert sum(row.parameters for row in rows) == param_counts(setup.config.model).total
    assert sum(row.layers for row in rows) == 7
    assert sum(row.time_share for row in rows) == pytest.approx(1.0)


def test_stages_count_layers_of_both_kinds() -> None:
    mixed = "--model.num_layers 5 --model.dense_layers 2 --model.ffn_size 192 --model.router_bias on"
    setup = setup_of(f"--mesh.data 4 --mesh.pipe 2 --pipeline.layers_per_stage 3,2 {mixed}", "tiny-moe")
    table, counts = tabulate_stages(setup), param_counts(setup.config.model)
    assert sum(row.parameters for row in table.rows) == counts.total
    assert table.rows[0].parameters - table.rows[1].parameters == 2 * counts.dense_block - counts.block - 64
    assert "room for 2 dense and 2 layers a stage" in table.notes[0]


def test_middle_stage_has_its_layers_alone() -> None:
    row = tabulate_stages(setup_of(f"{FOUR} --pipeline.vocab ends")).rows[1]
    assert row.parameters == row.layers * param_counts(setup_of(FOUR).config.model).block
    assert row.parameter_bytes == 4 * row.parameters


def test_equal_stages_have_the_bytes_of_the_sharding_table() -> None:
    setup = setup_of("--mesh.tensor 2 --mesh.pipe 2 --model.num_layers 6 --pipeline.vocab ends")
    arrays = sharding_table(setup.model.params).rows
    layers = sum(row.device_bytes for row in arrays if row.name.startswith("stages."))
    embed = sum(row.device_bytes for row in arrays if row.name.startswith("shared.embed."))
    head = sum(row.device_bytes for row in arrays if row.name.startswith("shared.head."))
    first, last = tabulate_stages(setup).rows
    assert first.layers == last.layers
    assert (first.parameter_bytes, last.parameter_bytes) == (layers + embed, layers + head)


def test_a_split_vocabulary_is_a_part_of_every_rank() -> None:
    setup = setup_of("--mesh.tensor 2 --mesh.pipe 2 --model.num_layers 6 --pipeline.vocab split")
    sizes = {row.name: row.device_bytes for row in sharding_table(setup.model.params).rows}
    layers = sum(size for name, size in sizes.items() if name.startswith("stages."))
    tables = sum(size for name, size in sizes.items() if name.endswith(".table"))
    norm = sum(size for name, size in sizes.items() if name.startswith("shared.head.norm."))
    first, last = tabulate_stages(setup).rows
    wanted = layers + tables + sizes.get("shared.embed.positions", 0), layers + tables + norm
    assert (first.parameter_bytes, last.parameter_bytes) == wanted


def test_activations_are_those_of_the_microbatches_in_flight() -> None:
    setup = setup_of(f"{FOUR} --pipeline.remat full")
    rows = tabulate_stages(setup).rows
    assert tuple(row.in_flight for row in rows) == simulate(setup.schedule).peak_in_flight == (7, 5, 3, 1)
    # 32 sequences over data=2 and 8 microbatches; full remat keeps x[2, 128, 128] in float32.
    assert [row.activation_bytes for row in rows] == [n * 2 * 128 * 128 * 4 for n in (7 * 1, 5 * 2, 3 * 2, 1 * 2)]


def test_chunks_of_a_rank_are_counted_at_the_same_moment() -> None:
    schedule = build_schedule("interleaved-1f1b", num_ranks=3, num_microbatches=6, num_chunks=2)
    held = microbatches_at_peak(schedule, layers_per_stage=(1,) * 6)
    assert tuple(held[rank] + held[rank + 3] for rank in range(3)) == simulate(schedule).peak_in_flight
    # Layers weigh: the moment that counts is one at which the large chunk is held most.
    own, most = [0, 0], 0
    for _, rank, action in schedule.placed():
        if rank == 0:
            own[action.stage // 3] += {"F": 1, "B": -1}[action.kind]
            most = max(most, own[1])
    assert microbatches_at_peak(schedule, layers_per_stage=(1, 1, 1, 100, 1, 1))[3] == most


def test_table_of_uneven_stages(golden: Callable[[str, str], None]) -> None:
    golden("stages_uneven.txt", str(tabulate_stages(setup_of(FOUR))))


def test_table_of_whole_ends(golden: Callable[[str, str], None]) -> None:
    golden("stages_ends.txt", str(tabulate_stages(setup_of(f"{FOUR} --pipeline.vocab ends --pipeline.remat full"))))


ENDS = {
    "loop": (FOUR, [0], [3], "The embedding is on rank 0, the head on rank 3."),
    "chunks": (CHUNKS, [0], [1], "The embedding is on rank 0, the head on rank 1."),
    "v": (V_SHAPED, [0], [0], "Embedding and head are on rank 0."),
}


@pytest.mark.parametrize("name", ENDS)
def test_table_says_which_rank_holds_embedding_and_head(name: str) -> None:
    words, embedding, head, text = ENDS[name]
    setup = setup_of(f"{words} --pipeline.vocab ends")
    assert ranks_of_ends(setup) == {"embedding": embedding, "head": head}
    assert text in tabulate_stages(setup).notes


@pytest.mark.parametrize("words", [FOUR, V_SHAPED])
def test_table_says_that_every_rank_holds_a_part_of_a_split_vocabulary(words: str) -> None:
    setup = setup_of(f"{words} --pipeline.vocab split")
    assert ranks_of_ends(setup) == {"embedding": [0, 1, 2, 3], "head": [0, 1, 2, 3]}
    assert any("Every rank holds 1/4 of embedding and head" in note for note in tabulate_stages(setup).notes)


@pytest.mark.parametrize("embeddings", ["tied", "untied"])
def test_the_first_rank_of_a_v_has_the_bytes_of_both_ends(embeddings: str) -> None:
    setup = setup_of(f"{V_SHAPED} --pipeline.vocab ends --model.embeddings {embeddings}")
    rows, config = tabulate_stages(setup).rows, setup.config.model
    counts = param_counts(config)
    assert [row.rank for row in rows] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert sum(row.parameters for row in rows) == counts.total
    # A tied table is one array on one rank; no other rank has anything of the ends.
    ends = counts.total - config.num_layers * counts.block
    own = [sum(row.parameter_bytes - 4 * row.layers * counts.block for row in rows if row.rank == r) for r in range(4)]
    assert own == [4 * ends, 0, 0, 0]


def test_table_of_a_v(golden: Callable[[str, str], None]) -> None:
    golden("stages_v.txt", str(tabulate_stages(setup_of(f"{V_SHAPED} --pipeline.vocab ends"))))


def test_one_rank_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "quickstart", "--mesh.pipe", "1", "--mesh.data", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == []


def test_scripts_get_the_stages_and_their_own_bubble(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "quickstart", *FOUR.split(), "--pipeline.layers_per_stage", "2,2,2,1", "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert [row["layers"] for row in numbers["stages"]] == [2, 2, 2, 1]
    assert numbers["ranks_of"] == {"embedding": [0, 1, 2, 3], "head": [0, 1, 2, 3]}
    cost = {n: StageCost(forward=n, input_grad=n, weight_grad=n) for n in (1, 2)}
    schedule = build_schedule("1f1b", num_ranks=4, num_microbatches=8)
    timing = simulate(schedule, stages=[cost[2], cost[2], cost[2], cost[1]])
    assert numbers["bubble_fraction"] == pytest.approx(timing.bubble_fraction)
    assert timing.bubble_fraction > 3 / 11


def test_bubble_of_uneven_stages_is_marked() -> None:
    schedule = build_schedule("1f1b", num_ranks=2, num_microbatches=4)
    even, large = (StageCost(forward=n, input_grad=n, weight_grad=n) for n in (1, 2))
    assert draw_schedule(schedule, stages=[even, even]) == draw_schedule(schedule)
    assert "of the time with these stages, in flight" in draw_schedule(schedule, stages=[even, large])


def test_layers_are_balanced_unless_they_are_given() -> None:
    assert setup_of(FOUR).layers_per_stage == (1, 2, 2, 2)
    assert setup_of(f"{FOUR} --pipeline.layers_per_stage 2,2,2,1").layers_per_stage == (2, 2, 2, 1)
    assert setup_of("--mesh.data 4 --mesh.pipe 1 --pipeline.layers_per_stage 2,2").layers_per_stage == (4,)


def test_note_says_that_8_bit_products_are_counted_as_16_bit() -> None:
    note = "Time counts products in fp8 as 16-bit ones"
    setup = setup_of(FOUR)
    assert note not in str(tabulate_stages(setup))
    config = setup.config.model_copy(update={"model": replace(setup.config.model, matmuls="fp8")})
    assert note in str(tabulate_stages(Setup(config, setup.mesh)))
