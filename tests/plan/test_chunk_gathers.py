"""Gathers of whole chunks are priced as the schedule's table has them."""

from typing import Any

import pytest
from trellax.configs import load_config
from trellax.configs.layout import layout_of, question_of
from trellax.pipeline import lower
from trellax.pipeline.lowering.tables import NONE
from trellax.plan.costs.update_time import find_gathers
from trellax.plan.machines.topology import read_topology
from trellax.plan.training_search import price_layout
from trellax.schedules import build_schedule

WORDS = (
    "--mesh.data 2 --mesh.tensor 1 --mesh.pipe 4 --pipeline.schedule interleaved-1f1b --pipeline.chunks 4 "
    "--pipeline.remat full --train.batch_size 64 --pipeline.microbatches"
)


def asked(shard: str, num_microbatches: int) -> tuple[Any, Any]:
    config = load_config("llama3-8b-8gpu", f"{WORDS} {num_microbatches} --train.shard {shard}")
    return question_of(config, topology=read_topology("h200x8")), layout_of(config, num_devices=8)


@pytest.mark.parametrize("num_microbatches", [8, 16, 32])
def test_rounds_and_slots_are_those_of_the_table(num_microbatches: int) -> None:
    question, layout = asked("chunk", num_microbatches)
    found = find_gathers(question.model, layout=layout, num_tokens=question.num_tokens, runtime=question.priced_runtime)
    schedule = build_schedule("interleaved-1f1b", num_ranks=4, num_chunks=4, num_microbatches=num_microbatches)
    tables = lower(schedule, gathers="chunks")
    assert tables.turns.weights is not None
    assert found.slots == tables.num_weight_slots
    assert found.rounds * 4 == (tables.turns.weights.gather != NONE).sum(axis=0).max()


def test_chunks_take_more_memory_than_layers_and_less_than_all_weights() -> None:
    total = {shard: price_layout(*asked(shard, 16)).memory.total for shard in ("step", "chunk", "layer")}
    assert total["layer"] < total["chunk"] < total["step"]
