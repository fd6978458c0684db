"""A mesh axis has a name and a role: code asks for the axes of a role, so own names work as the default ones do."""

from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P
from trellax.meshes import (
    DEFAULT_RULES,
    Axis,
    MeshAxes,
    MeshSpec,
    ShardingRules,
    TrellaxError,
    abstract_mesh,
    build_mesh,
    mesh_sizes,
)
from trellax.meshes.axes import DEFAULT_AXES

OWN = MeshSpec.of(dp=Axis(2, role="batch"), tp=Axis(2, role="tensor"), pp=Axis(2, role="pipe"))

# Values that a type checker would refuse.
UNKNOWN_ROLE: Any = "bacth"
SIZE_ALONE: Any = {"dp": 2}

MISTAKES: dict[str, Callable[[], Any]] = {
    "unknown_role": lambda: MeshSpec.of(dp=Axis(2, role=UNKNOWN_ROLE)),
    "role_in_a_text_is_empty": lambda: MeshSpec.parse("dp=2:"),
    "two_pipes": lambda: MeshSpec.of(pp=Axis(2, role="pipe"), stages=Axis(2, role="pipe")),
    "no_pipe": lambda: MeshAxes.of(dp="batch", tp="tensor"),
    "name_twice": lambda: MeshAxes(roles=(("pp", "pipe"), ("dp", "batch"), ("dp", "tensor"))),
    "name_twice_in_a_text": lambda: MeshSpec.parse("dp=2:batch,dp=4:tensor"),
    "default_name_of_another_role": lambda: MeshSpec.of(tensor=Axis(2, role="batch")),
    "no_name": lambda: MeshAxes(roles=(("pp", "pipe"), ("my axis", "batch"))),
    "name_without_a_role": lambda: MeshSpec.parse("dp=2"),
    "size_without_a_role": lambda: MeshSpec(axes=SIZE_ALONE),
    "own_size_is_zero": lambda: MeshSpec.of(dp=Axis(0, role="batch")),
    "own_sizes_do_not_fit": lambda: OWN.resize(dp=3).resolve(num_devices=8),
    "two_open_own_axes": lambda: OWN.resize(dp=-1, pp=-1),
    "resized_axis_is_unknown": lambda: OWN.resize(dpp=4),
    "no_role_for_a_mesh": lambda: mesh_sizes(abstract_mesh(OWN)),
    "rule_over_an_axis_of_another_mesh": lambda: ShardingRules.of(OWN.roles).replace(ffn="tpp"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_axis_that_cannot_be_is_refused(name: str, golden: Callable[[str, str], None]) -> None:
    with pytest.raises(TrellaxError) as caught:
        MISTAKES[name]()
    golden(f"errors/meshes/axes_{name}.txt", f"{type(caught.value).__name__}: {caught.value}")


def test_roles_without_an_axis_have_the_default_one_with_one_device() -> None:
    spec = MeshSpec.of(dp=Axis(4, role="batch"))
    assert spec.sizes == {"dp": 4, "tensor": 1, "pipe": 1}
    assert (spec.roles.pipe, spec.roles.batch, spec.roles.tensor) == ("pipe", ("dp",), ("tensor",))


def test_default_names_make_the_same_mesh_however_they_are_given() -> None:
    of = MeshSpec.of(pipe=Axis(2, role="pipe"), data=Axis(2, role="batch"))
    assert of == MeshSpec(data=2, pipe=2) == MeshSpec.parse("pipe=2,data=2:batch")
    assert of.roles == DEFAULT_AXES
    assert repr(of) == "MeshSpec(data=2, tensor=1, pipe=2)"


def test_spec_with_own_names_shows_names_and_roles() -> None:
    assert str(OWN) == "dp=2 tp=2 pp=2"
    assert eval(repr(OWN)) == OWN


def test_degrees_count_all_axes_of_a_role() -> None:
    spec = MeshSpec.parse("replica=2:batch,data=3,outer=2:tensor,inner=5:tensor,pp=7:pipe")
    assert (spec.data, spec.tensor, spec.pipe, spec.num_devices) == (6, 10, 7, 420)


def test_an_axis_of_both_splits_tokens_and_experts() -> None:
    spec = MeshSpec.parse("data=2,expert=3,context=5,context_expert=7")
    assert (spec.data, spec.context, spec.expert, spec.context_expert) == (6, 35, 21, 7)
    # Gradients of experts are summed over those with copies of them, all else over all.
    assert spec.roles.kept == ("data", "context")
    assert spec.roles.summed == ("data", "expert", "context", "context_expert")
    rules = ShardingRules.of(spec.roles)
    assert rules.spec(("batch", "tokens")) == P(("data", "expert"), ("context", "context_expert"))
    assert rules.spec(("experts", "embed", "ffn")) == P(("expert", "context_expert"), None, "tensor")


def test_devices_lie_by_role_the_pipe_outermost() -> None:
    own = build_mesh(MeshSpec.parse("tp=2:tensor,pp=2:pipe,dp=2:batch"))
    default = build_mesh(MeshSpec(data=2, tensor=2, pipe=2))
    assert own.axis_names == ("pp", "dp", "tp")
    assert (own.devices == default.devices).all()
    assert all(kind == jax.sharding.AxisType.Auto for kind in own.axis_types)


@pytest.mark.parametrize("text", ["dp=2:batch,tp=2:tensor,pp=2:pipe", "replica=2:batch,data=2", "data=2,pipe=4"])
def test_sizes_of_a_built_mesh_are_those_of_its_spec(text: str) -> None:
    spec = MeshSpec.parse(text)
    assert mesh_sizes(abstract_mesh(spec), axes=spec.roles) == spec


def test_mesh_with_default_names_needs_no_roles() -> None:
    spec = MeshSpec(data=2, tensor=2)
    assert mesh_sizes(abstract_mesh(spec), axes=OWN.roles) == spec


def test_rules_split_dimensions_over_the_axes_of_their_role() -> None:
    rules = ShardingRules.of(MeshSpec.parse("replica=2:batch,data=2,tp=2:tensor,pp=2:pipe").roles)
    assert rules.spec(("batch", "tokens", "embed")) == P(("replica", "data"), None, None)
    assert rules.spec(("stage", "embed", "heads")) == P("pp", None, "tp")
    assert rules.replace(ffn=None).axes("heads") == ("tp",)


def test_default_rules_are_those_of_the_default_axes() -> None:
    assert ShardingRules.of(MeshSpec().roles) == DEFAULT_RULES


def test_label_names_axes_with_several_devices_as_reports_do() -> None:
    spec = MeshSpec.parse("replica=2:batch,data=2,pp=1:pipe")
    assert spec.label("batch") == "replica+data"
    assert spec.label("pipe", "batch") == "replica+data"
    assert MeshSpec().label("pipe", "batch") == "data"
