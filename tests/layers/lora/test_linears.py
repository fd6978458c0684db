"""Patterns choose linear layers by dotted names, the same in every layer of a kind, and say so where they do not."""

from typing import Any

import jax
import pytest
from flax import nnx
from trellax.layers import ModelConfig, Transformer
from trellax.layers.experts.kinds import layer_kinds
from trellax.layers.lora.linears import adapted_by_run, adapted_names, linears_of
from trellax.meshes import ModelError

LLAMA: dict[str, Any] = {"vocab_size": 64, "num_layers": 4, "hidden_size": 32, "num_heads": 4, "mlp": "swiglu"}
LLAMA |= {"norm": "rmsnorm", "positions": "rotary", "bias": "off", "lora_rank": 2}
EXPERTS: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "expert_size": 24, "shared_size": 16}
LATENTS: dict[str, Any] = {"latent_size": 12, "query_latent_size": 8, "rope_head_size": 4}
MIXED: dict[str, Any] = EXPERTS | LATENTS | {"dense_layers": 1}

ATTENTION = ("query.down", "query.up", "latent_down", "key_value", "out")
IN_PARTS = ("gate", "up", "down")


def names_of(prefix: str, *ends: str) -> tuple[str, ...]:
    return tuple(f"{prefix}.{end}" for end in ends)


CHOSEN: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], ...]]] = {
    "*.attention.*": (MIXED, (names_of("attention", *ATTENTION),) * 2),
    "attention.query.*": (MIXED, (names_of("attention.query", "down", "up"),) * 2),
    "mlp.*": (
        MIXED,
        (names_of("mlp", *IN_PARTS), names_of("mlp.experts", *IN_PARTS) + names_of("mlp.shared", *IN_PARTS)),
    ),
    "mlp.down": (MIXED, (("mlp.down",), ())),
    "layers.*.mlp.down": (MIXED, (("mlp.down",), ())),
    "experts.[gu]*": (MIXED, ((), ("mlp.experts.gate", "mlp.experts.up"))),
    "layers.0.*.down": (MIXED, (("attention.query.down", "mlp.down"), ())),
    "layers.[123].mlp.shared.up": (MIXED, ((), ("mlp.shared.up",))),
    "down": (EXPERTS, (("mlp.experts.down", "mlp.shared.down"),)),
    "query": ({}, (("attention.query",),)),
}


@pytest.mark.parametrize("pattern", CHOSEN)
def test_pattern_chooses_the_layers_whose_names_it_matches(pattern: str) -> None:
    sizes, wanted = CHOSEN[pattern]
    config = ModelConfig(**LLAMA | sizes, lora_targets=(pattern,))
    assert tuple(tuple(one.name for one in own) for own in adapted_by_run(config)) == wanted
    # The config of each kind has the same layers, also where none is left.
    assert tuple(adapted_names(kind.config) for kind in layer_kinds(config)) == wanted


@pytest.mark.parametrize("sizes", [{}, {"mlp": "gelu"}, EXPERTS, LATENTS, MIXED], ids=str)
def test_all_linear_layers_are_those_of_the_tree(sizes: dict[str, Any]) -> None:
    config = ModelConfig(**LLAMA | sizes)
    params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))), nnx.Param))
    found = {
        jax.tree_util.keystr(path[1:-1], simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    kinds = layer_kinds(config)
    known = {
        ".".join((*([kind.name] if kind.name else []), *one.place)): (one.copies, one.num_in, one.num_out)
        for kind in kinds
        for one in linears_of(kind.config)
    }
    assert {name: (shape[1] if len(shape) == 4 else 1, *shape[-2:]) for name, shape in found.items()} == known
    assert set(adapted_names(config)) == {one.name for kind in kinds for one in linears_of(kind.config)}


@pytest.mark.parametrize(
    ("sizes", "pattern", "message"),
    [
        ({}, "*.atention.*", r"Did you mean '\*\.attention\.\*'"),
        ({}, "mlp.experts.up", "Did you mean 'mlp.up'"),
        (EXPERTS, "mlp.up", "name or match some of attention.query, .* mlp.experts.gate, "),
        (LATENTS, "query", "Did you mean "),
        (EXPERTS, "mlp.router", "the router is frozen"),
        ({}, "layers.4.*", "matches no linear layer of this model"),
        ({}, "layers.[01].mlp.up", r"match mlp.up in 2 of the layers 0 to 3, which are alike"),
        (MIXED, "layers.[12].*", r"in 2 of the layers 1 to 3.*\n.*'layers\.\*\.attention\.query\.up'"),
        ({}, "x" * 10_000, "matches no linear layer"),
    ],
)
def test_pattern_that_chooses_nothing_or_a_part_is_refused(sizes: dict[str, Any], pattern: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        ModelConfig(**LLAMA | sizes, lora_targets=("down", pattern))
    assert len(str(caught.value)) < 1000
