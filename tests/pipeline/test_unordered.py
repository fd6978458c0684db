"""The finder of collectives that may run at once, on programs written by hand, and on steps."""

from typing import Any

import pytest
from trellax.programs import hlo_text
from trellax.programs.hlo import HloModule

from .law import pipeline_step, small_model
from .unordered import find_unordered

PROGRAM = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}}

%body (carry: (s32[], f32[8], f32[8])) -> (s32[], f32[8], f32[8]) {{
  %carry = (s32[], f32[8], f32[8]) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  %x = f32[8] get-tuple-element(%carry), index=1
  %kept = f32[8] get-tuple-element(%carry), index=2
  %next = s32[] add(%count, %count)
  %sum = f32[8] all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
  ROOT %out = (s32[], f32[8], f32[8]) tuple(%next, %sum, %kept)
}}

%condition (carry: (s32[], f32[8], f32[8])) -> pred[] {{
  %carry = (s32[], f32[8], f32[8]) parameter(0)
  %count = s32[] get-tuple-element(%carry), index=0
  ROOT %less = pred[] compare(%count, %count), direction=LT
}}

ENTRY %main (n: s32[], p: f32[8], q: f32[8]) -> f32[8] {{
  %n = s32[] parameter(0)
  %p = f32[8] parameter(1)
  %q = f32[8] parameter(2)
  %start = (s32[], f32[8], f32[8]) tuple(%n, %p, %q)
  %loop = (s32[], f32[8], f32[8]) while(%start), condition=%condition, body=%body
  %written = f32[8] get-tuple-element(%loop), index=1
  %passed = f32[8] get-tuple-element(%loop), index=2
  %read = f32[8] negate(%{read})
  ROOT %last = f32[8] {kind}(%read), channel_id=1, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}, to_apply=%add
}}
"""
SAME, OTHER = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"


@pytest.mark.parametrize(
    ("read", "groups", "kind", "found"),
    [
        ("written", SAME, "all-reduce", False),
        ("passed", SAME, "all-reduce", True),
        ("q", SAME, "all-reduce", True),
        ("q", OTHER, "all-reduce", False),
        ("q", SAME, "all-gather", False),
    ],
)
def test_a_collective_after_a_loop_has_to_read_what_the_loop_writes(
    read: str, groups: str, kind: str, found: bool
) -> None:
    program = HloModule.parse(PROGRAM.format(read=read, groups=groups, kind=kind))
    assert find_unordered(program) == ([("loop", "last", {"all-reduce"})] if found else [])


def test_a_collective_before_a_loop_has_to_be_read_by_it() -> None:
    # In a program from the compilation cache neither waits for the other.
    text = PROGRAM.format(read="q", groups=SAME, kind="all-reduce")
    lines = text.splitlines()
    (loop,) = (line for line in lines if " while(" in line)
    after = lines[lines.index(loop) + 1 :]
    moved = [*lines[: lines.index(loop)], after[2], after[3].replace("ROOT ", ""), loop, *after[:2], *after[4:]]
    found = find_unordered(HloModule.parse("\n".join(moved).replace("%written =", "ROOT %written =")))
    assert found == [("last", "loop", {"all-reduce"})]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "step"),
    [
        ("4x1x2", {"schedule": "zb-h1", "shard": "layer"}),
        ("2x2x2", {"schedule": "zb-h1", "shard": "chunk", "vocab": "split", "sequence": "on"}),
        ("2x2x2", {"schedule": "1f1b", "shard": "layer", "vocab": "split", "sequence": "on"}),
    ],
)
def test_steps_have_none(mesh: str, step: dict[str, Any]) -> None:
    config = small_model(style="llama", attention="gqa", embeddings="untied")
    made = pipeline_step(config, mesh=mesh, num_microbatches=3, num_sequences=24, **step)
    run: Any = made.run
    assert find_unordered(HloModule.parse(hlo_text(run.lower(made.params, made.batch).compile()))) == []
