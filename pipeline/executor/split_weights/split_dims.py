"""Follow the dimension along which a device has a part of a parameter through `StageFns.prepare`.

With gather="layer" `prepare` is given parts, and what it makes of them is gathered. That is what it would make of the
whole only if each number of the result comes from one place along the cut dimension:

    kernels [D/d, F], [D/d, G]  --cast, concatenate along F-->  [D/d, F + G]      gathered along D: the same
    kernel  [D/d, F]            --reshape to [F, D/d]-->        [F, D/d]          gathered: rows in another order

So it is traced, and an operation that is not known to keep to that is refused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from ....layers.collectives import gather_weight
from ....meshes import ShardingError
from ..backward.open_calls import open_calls


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a parameter is kept: dimension `dim` cut over batch axes; () for one that is whole over them."""

    dim: int
    axes: tuple[str, ...]

    def behind(self, lead: int) -> "Split":
        """Return the same of an array with `lead` more dimensions in front."""
        return Split(dim=self.dim + lead, axes=self.axes)


WHOLE = Split(dim=0, axes=())

_ELEMENTWISE = frozenset(
    {"add", "convert_element_type", "copy", "copy_p", "div", "mul", "neg", "pcast", "pvary", "reduce_precision", "sub"}
)


def splits_after(prepare: Callable[[Any], Any], own: Any, splits: Sequence[Split]) -> list[Split]:
    """Return how the leaves of prepare(own) are split, given how those of own [D/d, F] are.

    Raises:
        ShardingError: an operation of `prepare` mixes what different devices have, or may do so.
    """
    traced = _trace(prepare, own)
    found: dict[Any, Split] = dict(zip(traced.invars, splits, strict=True))
    for eqn in traced.eqns:
        split = next((found[v] for v in eqn.invars if isinstance(v, Var) and found.get(v, WHOLE).axes), None)
        if split is not None:
            found |= dict.fromkeys(eqn.outvars, _after(eqn, split, found))
    # A size that it reads, w / w.shape[0], is another of the whole: the operations and numbers must be the same.
    whole = _trace(lambda own: prepare(jax.tree.unflatten(jax.tree.structure(own), _gathered(own, splits))), own)
    if _steps(traced) != _steps(whole):
        raise ShardingError(
            "prepare does another thing with a device's part of a weight than with the whole: with gather='layer' it "
            "is given parts.",
            fix="read no shapes in it, or use gather='step'.",
        )
    return [found.get(v, WHOLE) if isinstance(v, Var) else WHOLE for v in traced.outvars]


def _trace(prepare: Callable[[Any], Any], own: Any) -> Jaxpr:
    try:
        closed = jax.make_jaxpr(lambda own: jax.tree.leaves(prepare(own)))(own)
    except (TypeError, ValueError) as error:
        raise ShardingError(
            f"prepare fails for a device's part of the parameters ({error}): with gather='layer' it is given parts.",
            fix="use gather='step', or do that in layer.",
        ) from None
    return open_calls(closed, (own,), barriers="drop").jaxpr


def _gathered(own: Any, splits: Sequence[Split]) -> list[jax.Array]:
    pairs = zip(jax.tree.leaves(own), splits, strict=True)
    return [gather_weight(leaf, split.axes, dim=split.dim) if split.axes else leaf for leaf, split in pairs]


def _steps(jaxpr: Jaxpr) -> list[tuple[str, tuple[Any, ...]]]:
    """Return the operations of a jaxpr but for gathers, each with the numbers that stand in it."""
    return [
        (eqn.primitive.name, tuple(float(v.val) for v in eqn.invars if isinstance(v, Literal) and not _shape(v)))
        for eqn in jaxpr.eqns
        if eqn.primitive.name != "all_gather"
    ]


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape


def _after(eqn: JaxprEqn, split: Split, found: dict[Any, Split]) -> Split:
    """Return the split of an operation's results, one of whose operands is split."""
    kind, (first, *_), (out, *_) = eqn.primitive.name, eqn.invars, eqn.outvars
    operands = [v for v in eqn.invars if isinstance(v, Var)]
    if kind in _ELEMENTWISE and all(found.get(v, WHOLE) == split or not _shape(v) for v in operands):
        return split
    if kind == "concatenate" and eqn.params["dimension"] != split.dim:
        if all(found.get(v, WHOLE) == split for v in operands):
            return split
    elif kind == "transpose":
        return Split(dim=tuple(eqn.params["permutation"]).index(split.dim), axes=split.axes)
    elif kind in ("slice", "dynamic_slice") and _shape(first)[split.dim] == _shape(out)[split.dim]:
        return split
    raise ShardingError(
        f"prepare has the operation {kind}, which makes {out.aval.str_short()} of a device's part of a parameter: with "
        "gather='layer' it may cast, add, transpose, and join along other dimensions.",
        fix="move that operation into layer, or use gather='step'.",
    )
