"""The checks of the fields of a `ModelConfig` that are about adapters, and what a layer is told of its own."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from ...meshes import ModelError
from ...meshes.errors import shown, suggest
from .frozen_kernels import check_base
from .linears import HEAD, NO_LINEARS, LayerRun, adapted_of, ends_of, has_adapted_head, layer_runs, matching_layers

ADAPTERS = ("lora_a", "lora_b")
"""Names of the matrices of an adapter, [in, r] and [r, out]."""

MAGNITUDE = "lora_m"
"""Name of the magnitudes of a layer's columns, [out]."""

TRAINED = (*ADAPTERS, MAGNITUDE)
"""Names of all parameters of an adapter."""

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_targets", "lora_magnitude", "lora_base")
"""Fields of a `ModelConfig` that are about adapters."""

_LONGEST = 100
"""Characters of a pattern that are compared with names for a suggestion."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The adapter of one linear layer, whose kernel is frozen: y = x W + scale (x A) B.

    rank: features between A and B; 0 for a frozen layer without an adapter.
    scale: alpha / rank.
    magnitude: whether the length of each column is trained apart from its direction, as DoRA does.
    base: whether the kernel is held in the compute dtype ("plain") or in four bits, see `nf4.py`.
    """

    rank: int
    scale: float
    magnitude: Literal["off", "on"] = "off"
    base: Literal["plain", "nf4"] = "plain"


def lora_of(config: Any, name: str) -> Lora | None:
    """Return the adapter of a linear layer by its name in a layer (`linears.py`), None in a model without adapters.

    Args:
        config: that of layers of one kind.
    """
    if not config.lora_rank:
        return None
    rank = config.lora_rank if any(one.name == name for one in adapted_of(config)) else 0
    return Lora(rank=rank, scale=lora_scale(config), magnitude=config.lora_magnitude, base=config.lora_base)


def lora_of_head(config: Any) -> Lora | None:
    """Return the adapter of the output table, None if it has none."""
    if not has_adapted_head(config):
        return None
    return Lora(rank=config.lora_rank, scale=lora_scale(config), magnitude=config.lora_magnitude)


def lora_scale(config: Any) -> float:
    """Return alpha / rank; alpha is the rank if it is left out."""
    return (config.lora_alpha or config.lora_rank) / config.lora_rank


def check_lora(config: Any) -> None:
    """Raise unless the fields of a `ModelConfig` that are about adapters agree.

    Raises:
        ModelError: the rank is negative, fields are given without one, or a pattern matches no linear layer, or some
            of layers that are alike.
    """
    _check_given(config)
    check_base(config)
    if config.lora_rank and config.lora_targets != NO_LINEARS:
        runs = layer_runs(config)
        for pattern in config.lora_targets:
            _check_pattern(pattern, runs, config)
        _check_whole_runs(config.lora_targets, runs)


def _check_given(config: Any) -> None:
    if config.lora_rank < 0:
        raise ModelError(f"lora_rank={config.lora_rank} is negative.", fix="set it to 8, say, or 0 for no adapters.")
    if not isinstance(config.lora_targets, tuple) or not all(isinstance(name, str) for name in config.lora_targets):
        raise ModelError(
            f"lora_targets={config.lora_targets!r} is not a tuple of names.", fix="write ('query', 'mlp.*'), say."
        )
    for name in ("lora_alpha", "lora_targets"):
        if getattr(config, name) and not config.lora_rank:
            raise ModelError(
                f"{name}={getattr(config, name)}, but lora_rank=0: the model has no adapters.",
                fix=f"set lora_rank=8, say, or leave {name} out.",
            )
    if config.lora_magnitude == "on" and not config.lora_rank:
        raise ModelError(
            "lora_magnitude='on', but lora_rank=0: the model has no adapters.",
            fix="set lora_rank=8, say, or leave lora_magnitude out.",
        )


def _check_pattern(pattern: str, runs: tuple[LayerRun, ...], config: Any) -> None:
    """Raise unless a pattern matches a linear layer of the model."""
    if pattern == HEAD:
        if config.embeddings == "tied":
            raise ModelError(
                f"lora_targets has {HEAD!r}, and embeddings='tied': the table of the head is the embedding's.",
                fix="leave head out, or set embeddings='untied' if the weights are.",
            )
        return
    if any(matching_layers(pattern, one.name, run) for run in runs for one in run.linears):
        return
    last = pattern.rpartition(".")[2]
    if last == "gate" and not config.is_gated:
        raise ModelError(
            f"lora_targets has {pattern!r}, but mlp={config.mlp!r} has none.",
            fix="leave gate out, or set mlp='swiglu'.",
        )
    if last == "router":
        raise ModelError(
            f"lora_targets has {pattern!r}: the router is frozen, so that tokens keep to the experts that were trained "
            "on their like.",
            fix="name linear layers of experts, 'mlp.experts.*', or set lora_rank=0, to train all weights.",
        )
    names = list(dict.fromkeys(one.name for run in runs for one in run.linears))
    nearest = _nearest(pattern, names)
    raise ModelError(
        f"lora_targets has {shown(pattern)}, which matches no linear layer of this model.{nearest}",
        fix=f"name or match some of {', '.join(names)}, or leave it out for all.",
    )


def _nearest(pattern: str, names: list[str]) -> str:
    """Return a suggestion: the pattern with parts of names in place of mistyped ones, or else the nearest name."""
    parts = {part for name in names for part in name.split(".")}
    mended = ".".join(
        own if own in parts or not own.isidentifier() else next(iter(get_close_matches(own, parts, n=1)), own)
        for own in pattern[:_LONGEST].split(".")
    )
    run = LayerRun(0, 1, ())
    if mended != pattern and any(matching_layers(mended, name, run) for name in names):
        return f" Did you mean {mended!r}?"
    return suggest(pattern, [end for name in names for end in ends_of(name)])


def _check_whole_runs(patterns: tuple[str, ...], runs: tuple[LayerRun, ...]) -> None:
    """Raise if a linear layer is matched in some layers of a run: they lie in one array, [L, in, out]."""
    for run in runs:
        for one in run.linears:
            _check_whole_run(patterns, one.name, run)


def _check_whole_run(patterns: tuple[str, ...], name: str, run: LayerRun) -> None:
    matched: frozenset[int] = frozenset().union(*(matching_layers(own, name, run) for own in patterns))
    if 0 < len(matched) < run.count:
        raise ModelError(
            f"lora_targets={list(patterns)} match {name} in {len(matched)} of the layers {run.first} to "
            f"{run.first + run.count - 1}, which are alike: all {run.count} have adapters of it, or none.",
            fix=f"write 'layers.*.{name}', or {name!r}.",
        )
