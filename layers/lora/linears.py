"""The linear layers that may have adapters, by dotted names, and those that the patterns of `lora_targets` match.

    layers.3.attention.query             its name in layer 3: attention.query
    layers.3.attention.query.down        attention from latent vectors
    layers.3.mlp.down                    a dense feed-forward
    layers.3.mlp.experts.down            those of all experts of a mixture: an adapter each
    layers.3.mlp.shared.down             its shared experts
    head                                 the output table, where it is not the embedding's

A pattern matches a layer if it matches its whole name or an end of it that begins at a dot: "down" matches the last
three, "mlp.*" the last three, "mlp.down" one, "*.attention.*" the first two. `*` stands for any text, dots too.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any, Literal, NamedTuple

NO_LINEARS = ("none",)
"""`lora_targets` of a kind of layers of which none has an adapter; empty ones stand for all."""

HEAD = "head"
"""The name of the output table, which has an adapter only where `lora_targets` has this very name."""

_MOST_CACHED = 256


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of a block, or those of all experts.

    name: its dotted name within a layer, as patterns know it.
    place: names of the nodes of a block's tree that lead to its parameters.
    num_in, num_out: features.
    split: which of them is split over tensor, those out ("columns"), those in ("rows") or none.
    copies: number of experts that have one each; 1 for a layer that all tokens use.
    """

    name: str
    place: tuple[str, ...]
    num_in: int
    num_out: int
    split: Literal["columns", "rows", "none"]
    copies: int = 1

    def adapter_params(self, rank: int, *, magnitude: Literal["off", "on"], tensor: int = 1, expert: int = 1) -> int:
        """Return the parameters of its adapters on one device: r x (in + out) each, and a magnitude for each column."""
        num_in = self.num_in // (tensor if self.split == "rows" else 1)
        num_out = self.num_out // (tensor if self.split == "columns" else 1)
        copies = self.copies // expert if self.copies > 1 else 1
        return copies * (rank * (num_in + num_out) + (num_out if magnitude == "on" else 0))


class LayerRun(NamedTuple):
    """Layers of a model that are alike, `first` to `first + count`, and the linear layers of each."""

    first: int
    count: int
    linears: tuple[Linear, ...]


def layer_runs(config: Any) -> tuple[LayerRun, ...]:
    """Return the runs of layers that are alike, one or two: dense layers and those with experts."""
    dense, whole = config.dense_layers, config.num_layers
    own = LayerRun(dense, whole - dense, _linears(config, has_experts=config.num_experts > 0))
    return (LayerRun(0, dense, _linears(config, has_experts=False)), own) if dense else (own,)


def linears_of(config: Any) -> tuple[Linear, ...]:
    """Return the linear layers of a layer with experts, or of any layer of a model without them."""
    return layer_runs(config)[-1].linears


def adapted_of(config: Any) -> tuple[Linear, ...]:
    """Return those of `linears_of` that have adapters."""
    return adapted_by_run(config)[-1]


def adapted_by_run(config: Any) -> tuple[tuple[Linear, ...], ...]:
    """Return the linear layers with adapters of each run of `layer_runs`."""
    runs = layer_runs(config)
    if not config.lora_rank or config.lora_targets == NO_LINEARS:
        return tuple(() for _ in runs)
    return tuple(
        tuple(
            one
            for one in run.linears
            if not config.lora_targets or any(matching_layers(own, one.name, run) for own in config.lora_targets)
        )
        for run in runs
    )


def adapted_names(config: Any) -> tuple[str, ...]:
    """Return the names of all linear layers of a model that have adapters, each once, and of the head."""
    names = dict.fromkeys(one.name for own in adapted_by_run(config) for one in own)
    return (*names, HEAD) if has_adapted_head(config) else tuple(names)


def has_adapted_head(config: Any) -> bool:
    """Return whether the output table has an adapter."""
    return config.lora_rank > 0 and HEAD in config.lora_targets


def head_linear(config: Any) -> Linear:
    """Return the output table as a linear layer, [D, V@tensor]."""
    return Linear(name=HEAD, place=(), num_in=config.hidden_size, num_out=config.vocab_size, split="columns")


def targets_of_run(config: Any, number: int) -> tuple[str, ...]:
    """Return `lora_targets` for a model that has the layers of one run alone."""
    if not config.lora_rank or not config.lora_targets:
        return config.lora_targets
    return tuple(one.name for one in adapted_by_run(config)[number]) or NO_LINEARS


def matching_layers(pattern: str, name: str, run: LayerRun) -> frozenset[int]:
    """Return the numbers of the layers of a run in which a pattern matches a linear layer."""
    return _find_layers(pattern, name, run.first, run.count)


@lru_cache(maxsize=_MOST_CACHED)
def _find_layers(pattern: str, name: str, first: int, count: int) -> frozenset[int]:
    layers = range(first, first + count)
    if any(fnmatchcase(end, pattern) for end in ends_of(name)):
        return frozenset(layers)
    # Only its beginning tells layers apart.
    return frozenset(
        i for i in layers if fnmatchcase(f"layers.{i}.{name}", pattern) or fnmatchcase(f"{i}.{name}", pattern)
    )


def ends_of(name: str) -> tuple[str, ...]:
    """Return a dotted name and its ends that begin at a dot.

    >>> ends_of("mlp.experts.up")
    ('mlp.experts.up', 'experts.up', 'up')
    """
    parts = name.split(".")
    return tuple(".".join(parts[first:]) for first in range(len(parts)))


def _linears(config: Any, *, has_experts: bool) -> tuple[Linear, ...]:
    attention = _latent_linears(config) if config.latent_size else _head_linears(config)
    if not has_experts:
        return attention + _feed_forward(config, ("mlp",), config.ffn_size)
    experts = _feed_forward(config, ("mlp", "experts"), config.expert_size, copies=config.num_experts)
    shared = _feed_forward(config, ("mlp", "shared"), config.shared_size) if config.shared_size else ()
    return attention + experts + shared


def _head_linears(config: Any) -> tuple[Linear, ...]:
    d, q, kv = config.hidden_size, config.query_size, config.kv_size
    return (
        _attention("query", d, q, "columns"),
        _attention("key", d, kv, "columns"),
        _attention("value", d, kv, "columns"),
        _attention("out", q, d, "rows"),
    )


def _latent_linears(config: Any) -> tuple[Linear, ...]:
    d, queries, latent = config.hidden_size, config.query_latent_size, config.latent_size
    of_query = (_attention("query", d, config.query_size, "columns"),)
    if queries:
        down = _attention("query.down", d, queries, "none")
        of_query = (down, _attention("query.up", queries, config.query_size, "columns"))
    own = config.num_heads * (config.head_size - config.rope_head_size + config.value_head_size)
    return (
        *of_query,
        _attention("latent_down", d, latent + config.rope_head_size, "none"),
        _attention("key_value", latent, own, "columns"),
        _attention("out", config.value_size, d, "rows"),
    )


def _attention(name: str, num_in: int, num_out: int, split: Literal["columns", "rows", "none"]) -> Linear:
    place = ("attention", *name.split("."))
    return Linear(name=f"attention.{name}", place=place, num_in=num_in, num_out=num_out, split=split)


def _feed_forward(config: Any, names: tuple[str, ...], features: int, *, copies: int = 1) -> tuple[Linear, ...]:
    d, found = config.hidden_size, []
    # The kernels of experts lie in the mixture itself.
    place = names if copies == 1 else names[:1]
    for own in ("gate", "up", "down") if config.is_gated else ("up", "down"):
        num_in, num_out = (features, d) if own == "down" else (d, features)
        split: Literal["columns", "rows"] = "rows" if own == "down" else "columns"
        name = ".".join((*names, own))
        found.append(Linear(name=name, place=(*place, own), num_in=num_in, num_out=num_out, split=split, copies=copies))
    return tuple(found)
