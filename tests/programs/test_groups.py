"""Every notation that XLA has for device groups, and the mesh axes that groups run along."""

import pytest
from trellax.programs.groups import Groups, axis_of_groups, axis_of_pairs, read_groups
from trellax.programs.hlo import Array, Instruction

AXES = {"axes": ("pipe", "data", "tensor"), "shape": (2, 2, 2)}

WRITTEN: dict[str, Groups | None] = {
    "replica_groups={{0,1},{2,3}}, use_global_device_ids=true": ((0, 1), (2, 3)),
    "replica_groups={}": ((0, 1, 2, 3, 4, 5, 6, 7),),
    "replica_groups=[2,4]<=[8]": ((0, 1, 2, 3), (4, 5, 6, 7)),
    "replica_groups=[2,4]<=[4,2]T(1,0)": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "replica_groups=mesh['pipe'=2,'data'=2,'tensor'=2] {'tensor'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "replica_groups=mesh['pipe'=2,'data'=2,'tensor'=2] {'pipe','data'}, x=1": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}": ((0, 1), (2, 3), (4, 5), (6, 7)),
    "replica_groups=mesh['a'=8] {'a':(2)2}": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "replica_groups=mesh['a'=8] {'a':(1)4}": ((0, 2, 4, 6), (1, 3, 5, 7)),
    "source_target_pairs={{0,4},{1,5}}": ((0, 4), (1, 5)),
    "replica_groups=(something new)": None,
}


@pytest.mark.parametrize("text", WRITTEN)
def test_groups_are_read(text: str) -> None:
    line = Instruction(
        name="x", type=Array("f32", ()), opcode="all-reduce", payload="", attributes=f", {text}", is_root=False
    )
    assert read_groups(line, num_devices=8) == WRITTEN[text]


GROUPS: dict[str, tuple[Groups | None, str]] = {
    "tensor": (((0, 1), (2, 3), (4, 5), (6, 7)), "tensor"),
    "in any order": (((5, 4), (7, 6), (1, 0), (2, 3)), "tensor"),
    "pipe": (((0, 4), (1, 5), (2, 6), (3, 7)), "pipe"),
    "several axes": (((0, 2, 4, 6), (1, 3, 5, 7)), "pipe+data"),
    "all": (((0, 1, 2, 3, 4, 5, 6, 7),), "pipe+data+tensor"),
    "a diagonal": (((0, 3), (1, 2), (4, 7), (5, 6)), "unattributed"),
    "some lines only": (((0, 1), (2, 3)), "part of tensor"),
    "lines of several axes": (((0, 1), (2, 6)), "unattributed"),
    "single devices": (((0,), (1,)), "unattributed"),
    "strangers": (((0, 8),), "unattributed"),
    "not read": (None, "unattributed"),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_belong_to_axes(name: str) -> None:
    groups, axis = GROUPS[name]
    assert axis_of_groups(groups, **AXES) == axis


def test_groups_of_half_an_axis_are_named_part_of_it() -> None:
    assert axis_of_groups(((0, 1), (2, 3)), axes=("data",), shape=(4,)) == "part of data"


def test_pairs_belong_to_the_axis_on_which_they_move() -> None:
    assert axis_of_pairs(((0, 4), (1, 5)), **AXES) == "pipe"
    assert axis_of_pairs(((0, 4), (0, 1)), **AXES) == "unattributed"
    assert axis_of_pairs(((0, 0),), **AXES) == "unattributed"
