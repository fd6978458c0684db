"""The grammar of HLO text, as CPU and GPU compilers print it."""

from trellax.programs.execution_counts import count_executions
from trellax.programs.hlo import Array, HloModule, parse_type
from trellax.programs.matmul import matrix_flops
from trellax.programs.work import count_work

TEXT = """
HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[4,8]{1,0})->f32[4,4]{1,0}}, num_partitions=2

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inside (p.0: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  ROOT %all-reduce.1 = f32[4,8]{1,0} all-reduce(%p.0), channel_id=1, replica_groups=[1,2]<=[2], to_apply=%add
}

ENTRY %main.7_spmd (param: f32[4,8]) -> f32[4,4] {
  %param = f32[4,8]{1,0} parameter(0), metadata={op_name="x (an \\"input\\")" stack_frame_id=1}
  %start = ((f32[4,8]{1,0}), f32[4,8]{1,0:T(8,128)S(1)}, /*index=2*/u32[]) fusion-start(%param), kind=kCustom, calls=%inside
  %done = f32[4,8]{1,0} fusion-done(%start)
  %call = (f32[4,4]{1,0}, s8[4194304]{0}) custom-call(%done, %param), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %result = f32[4,4]{1,0} get-tuple-element(%call), index=0
}
"""  # noqa: E501


def test_types_are_read_with_their_bytes() -> None:
    assert parse_type("bf16[4,128]{1,0}") == Array("bf16", (4, 128))
    assert parse_type("f32[2,3]{0,1}") == Array("f32", (2, 3), is_row_major=False)
    assert parse_type("(s32[], (pred[8]{0}), /*index=2*/u4[3]{0})") == (
        Array("s32", ()),
        (Array("pred", (8,)),),
        Array("u4", (3,)),
    )
    assert [Array(dtype, (3,)).num_bytes for dtype in ("bf16", "f32", "pred", "u4", "f8e4m3fn", "token")] == [
        6,
        12,
        3,
        2,
        3,
        0,
    ]


def test_instructions_are_read() -> None:
    program = HloModule.parse(TEXT)
    start = program.entry.instructions["start"]
    assert (start.opcode, start.operands, start.called()) == ("fusion-start", ("param",), {"calls": ("inside",)})
    assert program.entry.root.name == "result"
    assert program.entry.instructions["param"].op_name == 'x (an \\"input\\")'
    assert program.num_instructions == 10


def test_a_collective_inside_an_asynchronous_fusion_counts_once() -> None:
    program = HloModule.parse(TEXT)
    executions = count_executions(program, num_devices=2)
    assert executions.counts["inside"].tolist() == [1, 1]
    work = count_work(program, executions, num_devices=2)
    kinds = {operation.name: operation.kind for operation in work.operations}
    assert kinds["start"] == "communication"
    assert "done" not in kinds
    assert "all-reduce.1" not in kinds


def test_products_in_library_calls_are_counted() -> None:
    program = HloModule.parse(TEXT)
    assert matrix_flops(program.entry.instructions["call"], program.entry) == 2 * 4 * 4 * 8
