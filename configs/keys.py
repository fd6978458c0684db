"""The keys of a run file as a list: for help, for suggestions, and for the test that freezes them."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ..meshes.terminal import fold

# The mesh and the model are plain dataclasses, which have no place for a description.
_MEANINGS = {
    "mesh.data": "devices over which the batch is split; -1 is what is left",
    "mesh.tensor": "devices over which heads, feed-forward and vocabulary are split",
    "mesh.pipe": "devices over which the layers are split into stages",
    "model.vocab_size": "number of token ids; 256 for bytes",
    "model.num_layers": "transformer blocks",
    "model.hidden_size": "width of the residual stream",
    "model.num_heads": "query heads",
    "model.num_kv_heads": "key and value heads; 0 means num_heads",
    "model.head_size": "width of one head; 0 means hidden_size / num_heads",
    "model.ffn_size": "width of the feed-forward; 0 derives it from hidden_size and mlp",
    "model.max_tokens": "longest sequence",
    "model.mlp": "kind of feed-forward",
    "model.norm": "kind of normalisation",
    "model.norm_epsilon": "added to the variance inside a norm",
    "model.positions": "learned table or rotary turns",
    "model.rope_theta": "slowest wavelength of rotary positions",
    "model.rope_scaling": "how rotary positions are stretched past the length first trained on",
    "model.rope_factor": "by how much they are stretched",
    "model.rope_low_frequency_factor": "llama3: turns within rope_original_tokens below which a pair is stretched",
    "model.rope_high_frequency_factor": "llama3: turns within rope_original_tokens above which it is not",
    "model.rope_original_tokens": "llama3: longest sequence before stretching",
    "model.attention": "what computes attention: flash attention where it can be (auto), or always this",
    "model.attention_window": "tokens that a token sees, itself included; 0 means all before it",
    "model.qk_norm": "RMSNorm of every query and key head",
    "model.bias": "bias of linear layers and layer norms; qkv for that of query, key and value alone",
    "model.embeddings": "whether the output shares the embedding's table",
    "model.dtype": "type to compute in; parameters are always float32",
    "model.matmuls": "what weights are multiplied in: the compute dtype (plain), or eight bits (needs qwix)",
}


Kind = Literal["whole", "number", "text", "list", "auto or list"]
"""How the text of an override is read; "auto or list" is the word auto, or whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a run file: `section.key`, what it takes, its default as TOML, and what it means."""

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
    """Return the keys of a config class in the order they are declared, sections as fields."""
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


def draw_keys(keys: list[Key], *, width: int | None = None) -> str:
    """Return the keys as aligned lines `--section.key  type  default  meaning`, a blank line between sections.

    Where they are wider than the width, the meaning stands below the rest.
    """
    lines: list[str] = []
    rows = [(f"--{key.name}", key.type_text, key.default, key.meaning) for key in keys]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    is_wide = width is not None and max(len(row[3]) for row in rows) + sum(widths) + 8 > width
    for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
        if i and key.section != keys[i - 1].section:
            lines.append("")
        if is_wide:
            lines += [f"  {'  '.join(row[:3])}".rstrip(), fold(f"      {row[3]}".rstrip(), width=width)]
            continue
        name, kind, default = (cell.ljust(size) for cell, size in zip(row[:3], widths, strict=True))
        lines.append(f"  {name}  {kind}  {default}  {row[3]}".rstrip())
    return "\n".join(lines)


def _list_fields(section: Any) -> list[tuple[str, Any, Any, str]]:
    if issubclass(section, BaseModel):
        fields = section.model_fields.items()
        return [(name, f.annotation, f.default, f.description or "") for name, f in fields]
    hints = typing.get_type_hints(section)
    return [(f.name, hints[f.name], f.default, "") for f in dataclasses.fields(section)]


def _kind(annotation: Any) -> Kind:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return "auto or list"
    if typing.get_origin(annotation) is tuple:
        return "list"
    return "whole" if annotation is int else "number" if annotation is float else "text"


def _type_text(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "|".join(typing.get_args(annotation))
    kind = _kind(annotation)
    return "auto|list" if kind == "auto or list" else kind


def _default_text(default: Any) -> str:
    if default is dataclasses.MISSING or default is PydanticUndefined:
        return "required"
    return "[]" if default == () else f"{default:g}" if isinstance(default, float) else str(default)
