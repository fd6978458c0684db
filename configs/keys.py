"""List the keys of a run config, for `trellax train --help`, docs/reference/config.md, suggestions and tests."""

import dataclasses
import itertools
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..meshes import MeshSpec
from ..meshes.axes import ROLES
from ..meshes.columns import GAP, align
from ..meshes.terminal import fold
from .mesh_section import DefaultMesh

_MEANINGS = {
    "mesh.data": "devices that the batch is split over; -1 takes all that are left",
    "mesh.tensor": "devices that heads, feed-forward and vocabulary are split over",
    "mesh.pipe": "devices that the layers are split over, as stages",
    "mesh.expert": "devices that the experts of a layer are split over, and the batch too",
    "mesh.context": "devices that the tokens of a sequence are split over, two chunks of each on a device",
    "mesh.context_expert": "devices that the tokens of a sequence are split over, and the experts too",
    "mesh.sequence": "sequence parallelism: tokens between layers are split over tensor; auto is on where they divide",
    "model.vocab_size": "number of token ids; 256 for bytes",
    "model.num_layers": "number of transformer blocks",
    "model.hidden_size": "width of the residual stream",
    "model.num_heads": "number of query heads",
    "model.num_kv_heads": "number of key/value heads; 0 means num_heads",
    "model.head_size": "width of one head; 0 means hidden_size / num_heads",
    "model.ffn_size": "width of the feed-forward; 0 derives it from hidden_size and mlp",
    "model.max_tokens": "longest sequence, in tokens",
    "model.mlp": "kind of feed-forward",
    "model.num_experts": "experts of a layer, of which a token uses some; 0 is a dense feed-forward",
    "model.dense_layers": "first layers without experts, whose feed-forward is dense, of ffn_size",
    "model.experts_per_token": "experts that each token uses",
    "model.expert_size": "width of one expert; 0 means ffn_size",
    "model.shared_size": "width of experts that all tokens use, together; 0 is none",
    "model.expert_capacity": "rows of an expert in one round over its mean load",
    "model.expert_overflow": "tokens beyond the capacity: further rounds, or dropped and counted",
    "model.router": "function from the router's logits to scores",
    "model.router_normalize": "whether the weights of a token's experts are divided by their sum",
    "model.router_scale": "factor of these weights",
    "model.router_groups": "groups of experts; a token uses the best, by two experts with router_bias, else by one",
    "model.router_groups_kept": "groups that a token may use",
    "model.router_bias": "bias of each expert: for the choice alone, to even out the load (on), or of logits (trained)",
    "model.router_bias_rate": "by how much this bias moves in a step",
    "model.balance_loss": "factor of the loss that evens out the experts' load",
    "model.router_z_loss": "factor of the loss that keeps the router's logits small",
    "model.norm": "kind of normalisation",
    "model.norm_epsilon": "epsilon added to the variance in a norm",
    "model.norm_place": "whether attention and feed-forward have a norm of their input, their output, or both",
    "model.positions": "learned position table, or rotary embeddings (RoPE)",
    "model.rope_theta": "base of the RoPE frequencies",
    "model.rope_scaling": "how RoPE is scaled to sequences longer than those first trained on",
    "model.rope_factor": "factor of that scaling",
    "model.rope_low_frequency_factor": "below so many turns in rope_original_tokens a frequency is scaled",
    "model.rope_high_frequency_factor": "above so many turns it is not; 4 for llama3, 32 for yarn",
    "model.rope_original_tokens": "dynamic, llama3, yarn and longrope: longest sequence before scaling, in tokens",
    "model.rope_short_factors": "longrope: what each frequency is divided by in sequences up to rope_original_tokens",
    "model.rope_long_factors": "longrope: what each is divided by in longer sequences",
    "model.rope_truncate": "yarn: whether the ramp from kept to scaled pairs begins and ends at whole pairs",
    "model.rope_attention_factor": "yarn, longrope: factor of rotated features; 0 derives it from rope_factor",
    "model.rope_mscale_all": "yarn: with latent_size, scores are multiplied by the square of 0.1 m ln(rope_factor) + 1",
    "model.rope_head_size": "features of each head that are rotated; 0 means all",
    "model.latent_size": "width of the vector from which keys and values of a token are computed (MLA); 0 is none",
    "model.query_latent_size": "with latent_size: width of the vector from which queries are computed; 0 means from x",
    "model.value_head_size": "with latent_size: width of a value head; 0 means head_size - rope_head_size",
    "model.attention": "attention kernel; auto is flash attention (cudnn) where it can run, and xla elsewhere",
    "model.attention_window": "tokens that a token attends to, itself included; 0 means all before it",
    "model.attention_pattern": "kinds of attention of the layers, repeated: full, window, unrotated; empty: all alike",
    "model.window_rope_theta": "base of the RoPE frequencies of layers of the kind window; 0 means as in all others",
    "model.attention_softcap": "c in c tanh(s / c), of attention scores; 0 is none",
    "model.attention_sinks": "whether each head has a learned score without a key, so its shares sum to less than 1",
    "model.qk_norm": "RMSNorm of each query and key head, or of all heads together (whole)",
    "model.bias": "biases of linear layers and layer norms; qkv: of query, key and value only",
    "model.embeddings": "whether the output projection shares the embedding table",
    "model.block": "a block of your own, module:Class, in place of trellax's",
    "model.mlp_class": "a feed-forward of your own, module:Class",
    "model.norm_class": "a norm of your own, module:Class",
    "model.attention_class": "an attention of your own, module:Class",
    "model.dims": "dims that these classes name, such as inner=tensor, split over that axis, or width=none",
    "model.dropout": "share of the numbers of each branch that training sets to zero",
    "model.stochastic_depth": "share of sequences for which training leaves a branch of the last layer out",
    "model.embedding_scale": "factor of the embedding's rows",
    "model.residual_scale": "factor of what each layer adds to the residual stream",
    "model.attention_scale": "factor of attention scores; 0 means 1 / sqrt(head_size)",
    "model.logit_scale": "factor of logits",
    "model.logit_softcap": "c in c tanh(s / c), of logits; 0 is none",
    "model.lora_rank": "features of low-rank adapters (LoRA), which alone are trained; 0 trains all weights",
    "model.lora_alpha": "adapters are multiplied by lora_alpha / lora_rank; 0 means lora_rank",
    "model.lora_targets": "linear layers with adapters: query, mlp.* or *.attention.*, say; all of blocks if left out",
    "model.lora_magnitude": "whether adapters train the length of each column apart from its direction (DoRA)",
    "model.lora_base": "how frozen kernels under adapters are held: in model.dtype (plain), or in four bits (nf4)",
    "model.dtype": "dtype to compute in; parameters are float32, but for frozen ones",
    "model.matmuls": "precision of matrix products with weights: model.dtype (plain), or fp8 (needs qwix)",
}
"""Meanings of the keys of dataclass sections, whose fields have no description."""

MOVED = {"optimizer.zero": 'it is train.shard now, "optimizer" for on and "none" for off'}
"""Keys of earlier versions, and what to write instead."""

Kind = Literal["whole", "number", "text", "list", "numbers", "auto or list"]
"""How the text of an override is parsed; "auto or list" is the word auto, or whole numbers with commas."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a run config, `section.key`, with its type, default and meaning as help prints them."""

    name: str
    kind: Kind
    type_text: str
    default: str
    meaning: str

    @property
    def section(self) -> str:
        """The part before the dot."""
        return self.name.partition(".")[0]

    @property
    def key(self) -> str:
        """The part after the dot."""
        return self.name.partition(".")[2]


def list_keys(config: type[BaseModel]) -> list[Key]:
    """Return the keys of a config class, whose fields are sections, in the order of their declaration."""
    keys = []
    for section, field in config.model_fields.items():
        for name, annotation, default, meaning in _list_fields(field.annotation):
            keys.append(
                Key(
                    name=f"{section}.{name}",
                    kind=_kind(annotation),
                    type_text=_type_text(annotation),
                    default=_default_text(default),
                    meaning=meaning or _MEANINGS.get(f"{section}.{name}", ""),
                )
            )
    return keys


def own_mesh_keys(names: Iterable[str]) -> list[Key]:
    """Return the keys of mesh axes with names of their own, `mesh.dp` and `mesh.roles.dp`, which no list shows."""
    kinds: dict[str, Kind] = {"mesh": "whole", f"mesh.{ROLES}": "text"}
    return [
        Key(name=f"{section}.{name}", kind=kind, type_text=kind, default="", meaning="")
        for name in names
        for section, kind in kinds.items()
    ]


def draw_keys(keys: list[Key], *, width: int | None = None) -> str:
    """Return the keys as aligned lines `--section.key  type  default  meaning`, a blank line between sections.

    If they are wider than `width` columns, the meaning is folded onto lines of its own.
    """
    lines = align([_list_cells(key) for key in keys], left=4).splitlines()
    if width is not None and max(map(len, lines)) > width:
        lines = []
        for key in keys:
            *head, meaning = _list_cells(key)
            lines.append(f"{GAP.join(head)}\n{fold(f'      {meaning}', width=width)}")
    sections = itertools.groupby(zip(keys, lines, strict=True), key=lambda pair: pair[0].section)
    return "\n\n".join("\n".join(line for _, line in pairs) for _, pairs in sections)


def render_keys(keys: list[Key]) -> str:
    """Return the keys as Markdown: a heading and a table for each section."""
    parts = []
    for section, own in itertools.groupby(keys, key=lambda key: key.section):
        rows = [
            f"| `{key.key}` | {_escape(key.type_text)} | {f'`{key.default}`' if key.default else ''} | "
            f"{_escape(key.meaning)} |"
            for key in own
        ]
        parts.append("\n".join([f"## [{section}]\n", "| key | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _list_cells(key: Key) -> tuple[str, ...]:
    return (f"  --{key.name}", key.type_text, key.default, key.meaning)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _list_fields(section: Any) -> list[tuple[str, Any, Any, str]]:
    section = DefaultMesh if section is MeshSpec else section
    if issubclass(section, BaseModel):
        fields = section.model_fields.items()
        return [(name, f.annotation, f.default, f.description or "") for name, f in fields]
    hints = typing.get_type_hints(section)
    return [(f.name, hints[f.name], f.default, "") for f in dataclasses.fields(section)]


def _kind(annotation: Any) -> Kind:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return "auto or list"
    if typing.get_origin(annotation) is tuple:
        return "numbers" if typing.get_args(annotation)[0] is float else "list"
    return "whole" if annotation is int else "number" if annotation is float else "text"


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    kind = _kind(annotation)
    return {"auto or list": "auto|list", "numbers": "list"}.get(kind, kind)


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING or default is PydanticUndefined:
        return "required"
    return "[]" if default == () else f"{default:g}" if isinstance(default, float) else str(default)
