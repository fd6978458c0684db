"""Which tensor of a Hugging Face file each parameter is, as data: a table for every architecture.

Parameters are named by their path in the tree of a `Transformer`. Read `read.py` and `write.py` for the use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where a parameter lives in a file.

    Args:
        name: the tensor's name, with `{layer}` where every layer has its own.
        layout: torch's linear layers hold [out, in], the transpose of ours; GPT-2's hold [in, out].
        part: which of `num_parts` equal parts of the last dimension, where one tensor holds several parameters.
    """

    name: str
    layout: Literal["same", "transposed"] = "same"
    part: int = 0
    num_parts: int = 1

    def shape(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the tensor, given that of the parameter of one layer."""
        wide = (*own[:-1], own[-1] * self.num_parts)
        return wide[::-1] if self.layout == "transposed" else wide

    def index(self, own: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return where in a tensor of that shape a block of the parameter of one layer is."""
        wide = shape[0] if self.layout == "transposed" else shape[-1]
        start = self.part * wide // self.num_parts
        moved = (*own[:-1], slice(own[-1].start + start, own[-1].stop + start))
        return moved[::-1] if self.layout == "transposed" else moved


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The tensors of an architecture.

    Args:
        prefix: what all names but the head's begin with; files of a model without its head may leave it out.
        homes: parameter by path; parameters that a config does not have are passed over.
        head: name of the output table, which has no prefix; where embeddings are tied it may be there or not.
        ignored: ends of names that hold no parameter: tables that older versions saved along.
    """

    prefix: str
    homes: Mapping[str, Home]
    head: str = "lm_head.weight"
    ignored: tuple[str, ...] = ()


def named(naming: Naming, tree: Any) -> dict[str, Home]:
    """Return where every parameter of a tree {"embed", "blocks", "head"} lives, by its path."""
    paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]
    return {path: naming.homes[path] for path in paths}


def _llama_homes() -> dict[str, Home]:
    layer = "layers.{layer}."
    linears = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.out": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    norms = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
    }
    homes = {f"blocks.{own}.kernel": Home(name=f"{layer}{n}.weight", layout="transposed") for own, n in linears.items()}
    homes |= {f"blocks.{own}.bias": Home(name=f"{layer}{n}.bias") for own, n in linears.items()}
    homes |= {f"blocks.{own}.scale": Home(name=f"{layer}{n}.weight") for own, n in norms.items()}
    return homes | {
        "embed.table": Home(name="embed_tokens.weight"),
        "head.norm.scale": Home(name="norm.weight"),
        "head.table": Home(name="lm_head.weight"),
    }


def _gpt2_homes() -> dict[str, Home]:
    layer = "h.{layer}."
    linears = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    norms = {"blocks.attention_norm": f"{layer}ln_1", "blocks.mlp_norm": f"{layer}ln_2", "head.norm": "ln_f"}
    homes = {
        "embed.table": Home(name="wte.weight"),
        "embed.positions": Home(name="wpe.weight"),
        "head.table": Home(name="lm_head.weight"),
    }
    for leaf, suffix in (("kernel", "weight"), ("bias", "bias")):
        homes |= {f"blocks.{own}.{leaf}": Home(name=f"{layer}{name}.{suffix}") for own, name in linears.items()}
        for part, own in enumerate(("query", "key", "value")):
            fused = Home(name=f"{layer}attn.c_attn.{suffix}", part=part, num_parts=3)
            homes[f"blocks.attention.{own}.{leaf}"] = fused
    for leaf, suffix in (("scale", "weight"), ("bias", "bias")):
        homes |= {f"{own}.{leaf}": Home(name=f"{name}.{suffix}") for own, name in norms.items()}
    return homes


_LLAMA = Naming(prefix="model.", homes=_llama_homes(), ignored=("rotary_emb.inv_freq",))
_GPT2 = Naming(prefix="transformer.", homes=_gpt2_homes(), ignored=(".attn.bias", ".attn.masked_bias"))

NAMINGS: dict[str, Naming] = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": _GPT2}
"""By `model_type` of config.json."""
