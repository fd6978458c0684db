"""The compiled programs update the cache in place, and send two all-reduces a layer and one hop a tick."""

from functools import cache
from typing import Any

import jax
import pytest
from trellax.layers import bytes_per_device
from trellax.programs.collectives import Collective, list_collectives
from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import HloModule
from trellax.serve.compiled_programs import CompiledPrograms, compile_programs
from trellax.serve.inspection.costs import ProgramReader
from trellax.serve.params import stage_shapes
from trellax.serve.state import ServeState, Sizes, state_shapes

from .models import mesh_of, model_of

SLOTS, CHUNK = 8, 16
FLOAT = 4


@cache
def build(
    mesh_text: str, *, max_tokens: int = 64, cache: Any = "float32", **changes: Any
) -> tuple[CompiledPrograms, ServeState]:
    """Both programs, compiled over shapes alone."""
    config, mesh = model_of("llama", max_tokens=max_tokens, **changes), mesh_of(mesh_text)
    sizes = Sizes(
        slots=SLOTS,
        max_tokens=max_tokens,
        groups=mesh.shape["pipe"],
        num_shards=mesh.shape["data"],
        chunk=CHUNK,
        items=2,
        rounds=2,
    )
    shapes = state_shapes(config, sizes, mesh=mesh, cache_dtype=cache)
    return compile_programs(config, sizes, mesh=mesh, state=shapes), shapes


@pytest.mark.parametrize(("mesh", "cache"), [("data=1", "fp8"), ("tensor=2,pipe=2", "bfloat16")])
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_cache_is_updated_in_place(mesh: str, cache: str, name: str) -> None:
    wide_heads = {"num_heads": 2, "head_size": 64}
    programs, shapes = build(mesh, cache=cache, max_tokens=4096, num_layers=8, **wide_heads)
    compiled, held = getattr(programs, name), bytes_per_device(shapes.cache)
    memory = compiled.memory_analysis()
    # Every byte of the state goes out where it came in.
    assert memory.alias_size_in_bytes >= bytes_per_device(shapes)
    # Attention takes out one block of pages; a row of the cache would be an eighth of it, or more.
    assert memory.temp_size_in_bytes < 0.01 * held
    keys = jax.tree.leaves(shapes.cache.keys)[0]
    whole = keys.sharding.shard_shape(keys.shape)
    text = HloModule.parse(compiled.as_text())
    made = {i.opcode for _, i in text.instructions() if getattr(i.type, "dims", None) == whole}
    assert made.isdisjoint({"copy", "copy-start", "convert", "select", "broadcast", "transpose", "pad"})


def sent(mesh: str, name: str) -> list[Collective]:
    """Collectives of one tick, the branches that data decides taken."""
    compiled, own = getattr(build(mesh)[0], name), mesh_of(mesh)
    program = HloModule.parse(compiled.as_text())
    return list(list_collectives(program, count_executions(program, num_devices=own.devices.size), mesh=own))


def tally(collectives: list[Collective], scope: str, device: int) -> dict[tuple[str, str, int], int]:
    """How often a device sends in a part of the program: by kind, axis and bytes."""
    found: dict[tuple[str, str, int], int] = {}
    for one in collectives:
        if scope in one.op_name.split("/") and one.count[device]:
            key = one.kind, one.axis, one.operand_bytes
            found[key] = found.get(key, 0) + int(one.count[device])
    return found


@pytest.mark.parametrize("mesh", ["tensor=2", "pipe=4", "data=2,tensor=2,pipe=2"])
def test_a_tick_sends_two_all_reduces_a_layer_and_one_hop(mesh: str) -> None:
    sizes = mesh_of(mesh).shape
    pipe, is_split = sizes["pipe"], sizes["tensor"] > 1
    rows = SLOTS // sizes["data"] // pipe
    x = rows * 32 * FLOAT
    found, first, last = sent(mesh, "decode"), 0, mesh_of(mesh).devices.size - 1
    two_a_layer = {("all-reduce", "tensor", x): 2 * (4 // pipe)} if is_split else {}
    one_hop = {("collective-permute", "pipe", x): 1, ("collective-permute", "pipe", rows * 4): 1} if pipe > 1 else {}
    for device in (first, last):
        assert tally(found, "layers", device) == two_a_layer
        assert tally(found, "exchange", device) == one_hop
    assert tally(found, "embed", first) == ({("all-reduce", "tensor", x): 1} if is_split else {})
    # The best score and its token. Only where a request asks for them: the best for min-p; the logits for top-k or
    # top-p; for log probabilities the best, the sum beside the chosen one, and 20 of each device with their scores.
    logits = ("all-gather", "tensor", rows * 64 // sizes["tensor"] * FLOAT)
    top = ("all-gather", "tensor", rows * 20 * FLOAT)
    sums = {("all-reduce", "tensor", rows * 4): 2 + 1 + 1, ("all-reduce", "tensor", rows * 2 * FLOAT): 1}
    assert tally(found, "choose", last) == (sums | {logits: 1, top: 2} if is_split else {})
    if pipe > 1:
        assert tally(found, "embed", last) == tally(found, "choose", first) == {}
    scopes = {"layers", "exchange", "embed", "choose"}
    assert [one.op_name for one in found if scopes.isdisjoint(one.op_name.split("/"))] == []


def test_a_chunk_of_a_prompt_sends_as_much_for_each_token() -> None:
    found = sent("data=2,tensor=2,pipe=2", "prefill")
    x = CHUNK * 32 * FLOAT
    assert tally(found, "layers", 0) == {("all-reduce", "tensor", x): 4}
    hops = [one for one in found if one.kind == "collective-permute"]
    assert [(one.operand_bytes, one.count.max()) for one in hops] == [(x, 1)]


def test_a_report_counts_the_bytes_kernels_and_collectives_of_a_tick() -> None:
    mesh = mesh_of("tensor=2")
    reader = ProgramReader(mesh=mesh, hardware=None, devices_per_node=2)
    one, device = reader.read(build("tensor=2")[0].decode, blocks=1)
    three, _ = reader.read(build("tensor=2")[0].decode, blocks=3)
    # Two all-reduces of each of four layers, one of the embedding, and the best score and its token.
    assert one.collectives == three.collectives == 2 * 4 + 1 + 2
    assert three.moved_bytes["attention"] > 2 * one.moved_bytes["attention"]
    assert three.moved_bytes["layers"] == one.moved_bytes["layers"]
    assert three.kernels > one.kernels > 4 * 4
    held = bytes_per_device(stage_shapes(model_of("llama", max_tokens=64), mesh=mesh)["blocks"])
    assert one.moved_bytes["layers"] > held
    assert (one.time_s, device in (0, 1)) == (None, True)
