"""The planner keeps context as a config has it, counts its traffic, and divides what tokens take."""

import itertools
from typing import Any, cast

import pytest
from trellax.configs import load_config
from trellax.configs.layout import layout_of, question_of
from trellax.layers import ModelConfig
from trellax.meshes import Axis, MeshSpec
from trellax.plan.costs.activations import layer_activation_bytes
from trellax.plan.costs.context_time import context_time
from trellax.plan.costs.layout import Layout
from trellax.plan.costs.memory_model import fullest, step_memory
from trellax.plan.costs.minimum_traffic import StepSizes, explain_ratios, minimum_bytes
from trellax.plan.costs.operations import LayerSize
from trellax.plan.costs.runtime import TRELLAX
from trellax.plan.legal_layouts import legal_layouts
from trellax.plan.machines.topology import read_topology
from trellax.plan.training_search import price_layout, search_train

SIZES: dict[str, Any] = {"vocab_size": 1024, "num_layers": 4, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 2}
MODEL = ModelConfig(max_tokens=512, dtype="bfloat16", positions="rotary", bias="off", **SIZES)
CONTEXT = {"context": Axis(4, role="context")}


def sizes(**more: Any) -> StepSizes:
    own: dict[str, Any] = {"num_microbatches": 3, "num_sequences": 2, "num_tokens": 512}
    return StepSizes(model=MODEL, mesh=MeshSpec(axes=CONTEXT), **(own | more))


def test_minimum_over_context_is_keys_and_values_or_heads_and_the_gradients() -> None:
    gradients = minimum_bytes(
        StepSizes(model=MODEL, mesh=MeshSpec(data=4), num_microbatches=3, num_sequences=2, num_tokens=512)
    )["data"]
    # bfloat16 of 2 x 64 features for 2 x 512 tokens, three quarters of them another rank's; there and back.
    layers = 4 * 3
    gathered = 2 * (2 * 64 * 2 * 512 * 2 * 3 / 4) * layers
    assert minimum_bytes(sizes())["context"] == gradients + gathered
    # Queries and outputs of 256 features as well, but a quarter of the tokens.
    exchanged = gathered * (64 + 256) / 64 / 4
    assert minimum_bytes(sizes(context_attention="ulysses"))["context"] == gradients + exchanged


def test_what_is_above_the_minimum_is_explained() -> None:
    assert any("gathers keys and values again" in note for note in explain_ratios(sizes()))
    for how in ("ulysses", "gather-once"):
        assert explain_ratios(sizes(context_attention=how), remat="none", shard="step") == ()
    notes = explain_ratios(sizes(context_attention="gather-once"), remat="full")
    assert any("the forward that the backward repeats gathers keys and values again" in note for note in notes)


def test_keys_that_are_kept_take_memory_and_less_time() -> None:
    """A layer keeps keys and values of all tokens in place of a quarter, and the backward has one collective less."""
    topology = read_topology("h200x8")
    given: dict[str, Any] = {"num_tokens": 512, "runtime": TRELLAX}
    layouts = [Layout(data=1, context=4, sequences=2, context_attention=how) for how in ("gather", "gather-once")]
    own, kept = (layer_activation_bytes(MODEL, layout=layout, **given) for layout in layouts)
    # Of 2 x 64 features in bfloat16: a device's own are not kept beside them.
    assert kept - own == 2 * (512 - 512 / 4) * 2 * 64 * 2
    size = LayerSize(sequences=2, queries=128, keys=512, tensor=1)
    twice, once = (context_time(MODEL, size=size, layout=layout, topology=topology, beside=0.0) for layout in layouts)
    assert once.forward == once.backward == twice.forward == twice.backward / 2


def test_a_backward_waits_once_for_what_rematerialization_sends_again() -> None:
    """Seconds of a layer, where no product hides any: compiled programs send 3 times with a gather, and 2 or 3 else."""
    topology, size = read_topology("h200x8"), LayerSize(sequences=2, queries=256, keys=512, tensor=1)
    times: dict[tuple[str, str], float] = {}
    for how, remat in itertools.product(("gather", "gather-once", "ulysses"), ("none", "dots", "full")):
        layout: Any = Layout(context=2, sequences=2, context_attention=cast("Any", how), remat=cast("Any", remat))
        own = context_time(MODEL, size=size, layout=layout, topology=topology, beside=0.0)
        # As `layer_time` adds the forward that "full" repeats.
        times[how, remat] = ((2 if remat == "full" else 1) * own.forward + own.backward) / own.forward
    assert times == pytest.approx(
        {
            **{("gather", remat): 3 for remat in ("none", "dots", "full")},
            **{("gather-once", remat): 2 for remat in ("none", "dots")},
            ("gather-once", "full"): 3,
            ("ulysses", "none"): 2,
            **{("ulysses", remat): 3 for remat in ("dots", "full")},
        }
    )


def test_layouts_of_a_search_have_the_context_that_is_asked_for() -> None:
    found = list(legal_layouts(MODEL, num_devices=8, batch_size=8, contexts=(4,)))
    assert {layout.context for layout in found} == {4}
    assert {layout.mesh.num_devices for layout in found} == {8}
    assert list(legal_layouts(MODEL, num_devices=6, batch_size=8, contexts=(4,))) == []


def test_activations_are_divided_and_a_config_is_priced_as_it_stands() -> None:
    whole, split = (
        fullest(step_memory(MODEL, layout=Layout(data=1, context=parts), num_tokens=512, runtime=TRELLAX))
        for parts in (1, 4)
    )
    assert split.activations == pytest.approx(whole.activations / 4)
    config = load_config("quickstart", ["--mesh.data", "1", "--mesh.context", "2"])
    question = question_of(config, topology=read_topology("h100x8"))
    plan = price_layout(question, layout_of(config, num_devices=8))
    assert (plan.layout.context, plan.numbers["mesh"]["context"], plan.layout.num_devices) == (2, 2, 8)
    # Sequences of 128 tokens are too short to split, but a config's own context is tried.
    assert {best.layout.context for best in search_train(question, top=50)} == {1, 2}
