"""Times of small programs by hand: what overlaps, what is exposed, what waits, and whom XLA left alone."""

from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import Mesh
from trellax.plan.machines.collective_time import CollectiveKind, collective_time_s, make_group
from trellax.plan.machines.kernel_time import MEMORY_SHARE, flash_time_s
from trellax.plan.machines.topology import read_topology
from trellax.programs import Hardware
from trellax.programs.collectives import list_collectives
from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import HloModule
from trellax.programs.timeline import efficiencies
from trellax.programs.timeline.compiler_changes import list_recomputed, list_synchronous
from trellax.programs.timeline.exposed import Exposed, StepTime, model_time, sum_exposed
from trellax.programs.timeline.overlap import list_spans
from trellax.programs.work import count_work

SECOND = 2 * 1024**3
"""Flops of a product of 1024 x 1024, which take a second here."""

HARDWARE = Hardware(
    name="test",
    memory_bytes=1,
    # Fast enough not to matter.
    memory_bytes_per_s=1e15,
    matrix_flops_per_s={"f32": SECOND / efficiencies.MATRIX_SHARE},
    vector_flops_per_s=1e15,
    # An all-gather of 4 MiB shards over two devices, and a permute of 4 MiB, take a second.
    link_bytes_per_s=2**22 / efficiencies.LINK_SHARE,
    network_bytes_per_s=2**22 / efficiencies.NETWORK_SHARE,
)

X = "f32[1024,1024]"
Y = "f32[2048,1024]"
DOT = "dot({0}, {0}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
GROUPS = "replica_groups={{0,1}}, dimensions={0}"


def product(name: str, operand: str) -> str:
    return f"  %{name} = {X} {DOT.format('%' + operand)}\n"


def gather(name: str, operand: str) -> str:
    return f"  %{name} = ({X}, {Y}) all-gather-start(%{operand}), {GROUPS}\n"


def done(name: str, start: str) -> str:
    return f"  %{name} = {Y} all-gather-done(%{start})\n"


def program(*lines: str, before: str = "") -> HloModule:
    body = "".join(lines)
    return HloModule.parse(f"{before}\nENTRY %main (x: {X}) -> {X} {{\n  %x = {X} parameter(0)\n{body}}}\n")


def run(hlo: HloModule, num_devices: int = 2) -> tuple[StepTime, tuple[Exposed, ...]]:
    """The modelled step, without launches, which are microseconds beside seconds."""
    mesh = Mesh(np.arange(num_devices), ("tensor",))
    executions = count_executions(hlo, num_devices=num_devices)
    collectives = list_collectives(hlo, executions, mesh=mesh)
    work = count_work(hlo, executions, num_devices=num_devices)
    step, seconds = model_time(hlo, collectives, work, hardware=HARDWARE, mesh=mesh, devices_per_node=num_devices)
    rows = sum_exposed(collectives, [span for _, span in list_spans(hlo)], seconds=seconds)
    return step, rows


def seconds(step: StepTime) -> tuple[float, float, float]:
    return round(step.matrix_s, 3), round(step.exposed_s, 3), round(step.waiting_s, 3)


def test_a_product_hides_a_collective_of_the_same_length() -> None:
    step, (row,) = run(program(gather("s", "x"), product("y", "x"), done("g", "s")))
    assert seconds(step) == (1, 0, 0)
    assert (row.count, row.exposed_count, row.bytes, row.exposed_bytes, row.share) == (1, 0, 2**22, 0, 0)


def test_a_collective_longer_than_its_product_is_exposed_for_the_rest() -> None:
    step, (row,) = run(program(gather("s", "x"), product("y", "x"), gather("t", "x"), done("g", "s"), done("h", "t")))
    # The second one starts on the link when the first one ends, with the product; nothing is left to hide it.
    assert seconds(step) == (1, 1, 0)
    # It encloses no product: half of the bytes.
    assert (row.exposed_count, row.share) == (1, 0.5)
    assert row.transfer_s == pytest.approx(2, rel=1e-3)


def test_work_that_two_collectives_enclose_hides_one() -> None:
    step, (row,) = run(program(gather("s", "x"), gather("t", "x"), product("y", "x"), done("g", "s"), done("h", "t")))
    assert seconds(step) == (1, 1, 0)
    # Both enclose the product, so no byte is exposed by the count alone.
    assert row.exposed_bytes == 0


def test_a_synchronous_collective_is_exposed() -> None:
    hlo = program(product("y", "x"), f"  %g = {Y} all-gather(%y), {GROUPS}\n")
    step, (row,) = run(hlo)
    assert seconds(step) == (1, 1, 0)
    assert row.exposed_bytes == 2**22


WRAPPED = f"%inside (p: {X}) -> {Y} {{\n  %p = {X} parameter(0)\n  ROOT %g = {Y} all-gather(%p), {GROUPS}\n}}\n"


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (f"(({X}), {Y}) fusion-start(%x), kind=kCustom, calls=%inside", "fusion-done"),
        (f"(({X}), {Y}) async-start(%x), calls=%inside", "async-done"),
    ],
)
def test_a_wrapped_collective_is_one_too(start: str, end: str) -> None:
    hlo = program(f"  %s = {start}\n", product("y", "x"), f"  %e = {Y} {end}(%s)\n", before=WRAPPED)
    step, (row,) = run(hlo)
    assert seconds(step) == (1, 0, 0)
    assert (row.count, row.exposed_bytes) == (1, 0)


def test_a_wrapped_collective_without_an_end_is_synchronous() -> None:
    hlo = program(f"  %s = {Y} fusion(%x), kind=kCustom, calls=%inside\n", before=WRAPPED)
    step, (row,) = run(hlo)
    assert seconds(step) == (0, 1, 0)
    assert row.exposed_count == 1


LOOP = f"""
%body (c: (s32[], {X})) -> (s32[], {X}) {{
  %c = (s32[], {X}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = {X} get-tuple-element(%c), index=1
  %w = {X} {DOT.format("%v")}
  ROOT %r = (s32[], {X}) tuple(%i, %w)
}}
%condition (d: (s32[], {X})) -> pred[] {{
  %d = (s32[], {X}) parameter(0)
  ROOT %t = pred[] constant(true)
}}
"""
WHILE = f"""  %n = s32[] constant(0)
  %in = (s32[], {X}) tuple(%n, %x)
  %l = (s32[], {X}) while(%in), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
"""


def test_a_loop_with_a_product_hides_and_counts_its_iterations() -> None:
    step, (row,) = run(program(gather("s", "x"), WHILE, done("g", "s"), before=LOOP))
    assert seconds(step) == (3, 0, 0)
    assert row.exposed_bytes == 0


BRANCHES = f"""
%works (a: {X}) -> {X} {{
  %a = {X} parameter(0)
  ROOT %b = {X} {DOT.format("%a")}
}}
%rests (o: {X}) -> {X} {{
  ROOT %o = {X} parameter(0)
}}
"""
BRANCH = f"""  %p = u32[] partition-id()
  %zero = u32[] constant(0)
  %first = pred[] compare(%p, %zero), direction=EQ
  %y = {X} conditional(%first, %x, %x), true_computation=%works, false_computation=%rests
"""


def test_a_device_waits_for_one_that_works_longer() -> None:
    step, (row,) = run(program(BRANCH, f"  %g = {Y} all-gather(%y), {GROUPS}\n", before=BRANCHES))
    # The device that works: a second each of product and transfer. The other one waits, which is no exposure.
    assert seconds(step) == (1, 1, 0)
    assert row.exposed_s == pytest.approx(1, rel=1e-3)
    hlo = program(BRANCH, before=BRANCHES)
    assert seconds(run(hlo)[0]) == (1, 0, 0)


def test_a_receiver_waits_for_its_sender_and_a_bystander_for_nobody() -> None:
    pairs = "source_target_pairs={{0,1}}"
    hlo = program(BRANCH, f"  %g = {X} collective-permute(%y), {pairs}\n", before=BRANCHES)
    mesh = Mesh(np.arange(4), ("pipe",))
    executions = count_executions(hlo, num_devices=4)
    (one,) = list_collectives(hlo, executions, mesh=mesh)
    runs = efficiencies.transfers(hlo, [one], hardware=HARDWARE, mesh=mesh, devices_per_node=4)
    assert np.round(runs["g"].seconds, 3).tolist() == [1, 1, 0, 0]
    latest = efficiencies.latest(np.array([5.0, 1, 2, 3]), runs["g"].groups, is_permute=True)
    assert latest.tolist() == [5, 5, 2, 3]


def test_fused_attention_reaches_less_of_the_peak_than_a_product() -> None:
    config = (
        '{"mask_type":"NO_MASK","intermediate_tensor_shape":{"element_type":"F32","dimensions":["1","1","512","512"]}}'
    )
    shape = "f32[1,1,512,1024]"
    hlo = HloModule.parse(
        f"ENTRY %main (q: {shape}) -> {shape} {{\n  %q = {shape} parameter(0)\n"
        f'  ROOT %a = {shape} custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", '
        f"backend_config={config}\n}}\n"
    )
    executions = count_executions(hlo, num_devices=1)
    work = count_work(hlo, executions, num_devices=1)
    times = efficiencies.kernel_times_s(hlo, work.operations, HARDWARE)
    share = efficiencies.MATRIX_SHARE / efficiencies.FLASH_SHARES["__cudnn$fmhaSoftmax"]
    # Two products of 512 x 1024 x 512.
    assert times["a"]["matrix"] == pytest.approx(share * 2 * 2 * 512 * 1024 * 512 / SECOND, rel=1e-6)


def test_synchronous_collectives_and_recomputation_are_named_by_place() -> None:
    place = 'metadata={op_name="jit(step)/while/body/forward/reduce_scatter"}'
    hlo = program(f"  %y.remat = {X} add(%x, %x), {place}\n", f"  %g = {Y} all-gather(%y.remat), {GROUPS}, {place}\n")
    executions = count_executions(hlo, num_devices=2)
    collectives = list_collectives(hlo, executions, mesh=Mesh(np.arange(2), ("tensor",)))
    (named,) = list_synchronous(collectives, [span for _, span in list_spans(hlo)])
    assert (named.place, named.kind, named.axis, named.count) == (
        "jit(step)/forward/reduce_scatter",
        "all-gather",
        "tensor",
        1,
    )
    (again,) = list_recomputed(count_work(hlo, executions, num_devices=2).operations)
    assert (again.count, again.flops, again.moved_bytes) == (1, 2**20, 3 * 2**22)


def test_nothing_takes_time_on_links_of_unknown_speed() -> None:
    unknown = replace(HARDWARE, link_bytes_per_s=0.0, network_bytes_per_s=0.0)
    hlo = program(f"  %g = {Y} all-gather(%x), {GROUPS}\n")
    mesh = Mesh(np.arange(2), ("tensor",))
    collectives = list_collectives(hlo, count_executions(hlo, num_devices=2), mesh=mesh)
    runs = efficiencies.transfers(hlo, collectives, hardware=unknown, mesh=mesh, devices_per_node=2)
    assert runs["g"].seconds.tolist() == [0, 0]


def test_the_shares_of_the_peaks_are_the_planners() -> None:
    card = H200X16.accelerator
    assert (card.matmul_share, MEMORY_SHARE) == (efficiencies.MATRIX_SHARE, efficiencies.MEMORY_SHARE)
    peak = card.peak_flops_per_s("bfloat16")
    forward_s = flash_time_s(card, flops=peak, direction="forward", kernel="vendor", dtype="bfloat16")
    backward_s = flash_time_s(card, flops=peak, direction="backward", kernel="vendor", dtype="bfloat16")
    assert [1 / forward_s, 1 / backward_s] == pytest.approx(list(efficiencies.FLASH_SHARES.values()))


@pytest.mark.parametrize("mib", [32, 128, 512])
@pytest.mark.parametrize(("axis", "size"), [("tensor", 8), ("pipe", 2)])
@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "collective-permute"])
def test_collectives_take_as_long_as_the_planner_says(kind: str, axis: str, size: int, mib: int) -> None:
    num_bytes = mib * 2**20
    shard = num_bytes // 4 // (size if kind == "all-gather" else 1)
    groups = f"source_target_pairs={PAIRS[axis]}" if kind == "collective-permute" else f"replica_groups={LISTS[axis]}"
    hlo = HloModule.parse(
        f"ENTRY %main (x: f32[{shard}]) -> f32[{num_bytes // 4}] {{\n  %x = f32[{shard}] parameter(0)\n"
        f"  ROOT %g = f32[{num_bytes // 4}] {kind}(%x), {groups}\n}}\n"
    )
    mesh = Mesh(np.arange(16).reshape(2, 8), ("pipe", "tensor"))
    collectives = list_collectives(hlo, count_executions(hlo, num_devices=16), mesh=mesh)
    assert [one.axis for one in collectives] == [axis]
    card = H200X16.accelerator
    hardware = replace(HARDWARE, link_bytes_per_s=card.link_bytes_per_s, network_bytes_per_s=card.network_bytes_per_s)
    runs = efficiencies.transfers(hlo, collectives, hardware=hardware, mesh=mesh, devices_per_node=8)
    names: dict[str, CollectiveKind] = {
        "all-reduce": "all_reduce",
        "all-gather": "all_gather",
        "collective-permute": "send",
    }
    group = make_group(H200X16, size=size, stride=1 if axis == "tensor" else 8)
    planned_s = collective_time_s(names[kind], num_bytes=num_bytes, group=group, topology=H200X16)
    # The planner interpolates between measured sizes.
    assert runs["g"].seconds.max() == pytest.approx(planned_s, rel=0.12)


LISTS = {"tensor": "[2,8]<=[16]", "pipe": "[8,2]<=[2,8]T(1,0)"}
PAIRS = {"tensor": "{{0,1},{8,9}}", "pipe": "{{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}"}
H200X16 = read_topology("h200x16/8")
