"""Split `lax.cond` and `lax.switch` in two, where only some results are needed in the first half of a backward.

    dx, dw = cond(i, both, grad)    ->    dx, h = cond(i, first, grad);  dw = cond(i, second, h)

A branch of a backward computes gradients of inputs and of weights. As one equation it would run as a whole in the first
half. Values h that the second branch reads from the first are results of the first cond. All branches of a cond return
the same types, so h has as many entries of each type as the branch that needs the most, and zeros where a branch has
fewer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var, primitives

from ....meshes.device_axes import mark_varying
from .equations import Env, cuts_between, is_acting, is_heavy, needed, read_by, run, start_env, value_of, without
from .open_calls import open_calls


def split_branches(closed: ClosedJaxpr, example: Any, *, first: Sequence[Any]) -> ClosedJaxpr:
    """Return the jaxpr with conds split, so that the outputs `first` need only the first part of each.

    The leaves of `example` have the types of its inputs.
    """
    # Variables that the first half reads or returns: results of a cond among them are due in its first part.
    due = read_by(needed(closed.jaxpr.eqns, first)) | dict.fromkeys(v for v in first if isinstance(v, Var))

    def flat(*args: Any) -> list[Any]:
        env = start_env(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        for eqn in closed.jaxpr.eqns:
            # A cond that prints stays whole: in two parts it could print twice.
            if eqn.primitive is primitives.cond_p and not is_acting(eqn):
                _run_cond(eqn, env, [out in due for out in eqn.outvars])
            else:
                run([eqn], env)
        return [value_of(env, out) for out in closed.jaxpr.outvars]

    return jax.make_jaxpr(flat)(*example)


def _run_cond(eqn: JaxprEqn, env: Env, is_due: list[bool]) -> None:
    """Add the results of a cond to `env`, computed by two conds if only some of them are due in the first half."""
    index, *operands = (value_of(env, v) for v in eqn.invars)
    branches = [_open_branch(branch, operands, is_due) for branch in eqn.params["branches"]]
    # Gradients of biases and norm scales go with the first half, as in split_backward.py.
    is_first = [due or all(_is_light(one, number, is_due) for one in branches) for number, due in enumerate(is_due)]
    if all(is_first) or not any(is_first):
        run([eqn], env)
        return
    halves = [_cut(one, is_first) for one in branches]
    slots = _share_slots(halves)
    early, kept = jax.lax.switch(index, [half.first_branch(slots) for half in halves], *operands)
    # Only operands that some second branch reads: the others need not live until the second half.
    used = sorted({place for half in halves for place in half.operands_of_second()})
    late = jax.lax.switch(
        index, [half.second_branch(slots, used) for half in halves], kept, [operands[place] for place in used]
    )
    env |= zip(_chosen(eqn.outvars, is_first), early, strict=True)
    env |= zip(_chosen(eqn.outvars, [not one for one in is_first]), late, strict=True)


def _open_branch(branch: ClosedJaxpr, operands: list[Any], is_due: list[bool]) -> ClosedJaxpr:
    """Return a branch with its calls inlined and its own conds split."""
    opened = open_calls(branch, operands, barriers="drop")
    return split_branches(opened, operands, first=_chosen(opened.jaxpr.outvars, is_due))


def _chosen(values: Iterable[Any], is_chosen: Iterable[bool]) -> list[Any]:
    return [value for value, chosen in zip(values, is_chosen, strict=True) if chosen]


def _is_light(branch: ClosedJaxpr, number: int, is_due: list[bool]) -> bool:
    """Return whether an output of a branch needs no heavy equation besides those of the outputs that are due."""
    outs, eqns = branch.jaxpr.outvars, branch.jaxpr.eqns
    early = needed(eqns, _chosen(outs, is_due))
    return not any(map(is_heavy, needed(without(eqns, early), [outs[number]])))


Slot = tuple[tuple[int, ...], Any, tuple[str, ...]]
"""Shape, dtype and varying axes of a value that the first cond returns for the second."""


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """A branch as two lists of equations.

    cuts: variables that the first list makes and the second reads.
    early, late: outputs of the first and of the second.
    """

    closed: ClosedJaxpr
    first: list[JaxprEqn]
    second: list[JaxprEqn]
    cuts: list[Var]
    early: list[Any]
    late: list[Any]

    def first_branch(self, slots: Sequence[Slot]) -> Any:
        """Return a function from the operands to (early outputs, a value for every slot: cuts, and zeros)."""

        def branch(*operands: Any) -> tuple[list[Any], list[Any]]:
            env = start_env(self.closed.jaxpr, self.closed.consts, operands)
            run(self.first, env)
            kept = dict(zip(self._places(slots), self.cuts, strict=True))
            handed = [env[kept[place]] if place in kept else _zeros(slot) for place, slot in enumerate(slots)]
            return [value_of(env, out) for out in self.early], handed

        return branch

    def second_branch(self, slots: Sequence[Slot], used: Sequence[int]) -> Any:
        """Return a function from the values of the slots and the operands at places `used` to the late outputs."""

        def branch(kept: list[Any], operands: list[Any]) -> list[Any]:
            env = start_env(self.closed.jaxpr, self.closed.consts, ())
            env |= {self.closed.jaxpr.invars[place]: value for place, value in zip(used, operands, strict=True)}
            env |= {cut: kept[place] for cut, place in zip(self.cuts, self._places(slots), strict=True)}
            run(self.second, env)
            return [value_of(env, out) for out in self.late]

        return branch

    def operands_of_second(self) -> list[int]:
        """Return the places of the operands that the second list of equations reads."""
        read = read_by(self.second) | dict.fromkeys(v for v in self.late if isinstance(v, Var))
        return [place for place, v in enumerate(self.closed.jaxpr.invars) if v in read]

    def _places(self, slots: Sequence[Slot]) -> list[int]:
        """Return a slot of its own type for every cut."""
        free = list(range(len(slots)))
        places = []
        for cut in self.cuts:
            place = next(place for place in free if slots[place] == _slot_of(cut))
            free.remove(place)
            places.append(place)
        return places


def _cut(closed: ClosedJaxpr, is_first: list[bool]) -> _Halves:
    """Divide the equations of a branch by the outputs that need them."""
    outs, eqns = closed.jaxpr.outvars, closed.jaxpr.eqns
    early, late = _chosen(outs, is_first), _chosen(outs, [not one for one in is_first])
    first = needed(eqns, early)
    second = without(needed(eqns, late), first)
    cuts = cuts_between(first, second, late)
    return _Halves(closed=closed, first=first, second=second, cuts=cuts, early=early, late=late)


def _share_slots(halves: Iterable[_Halves]) -> list[Slot]:
    """Return the types of the values between both conds: of each type as many as any branch needs."""
    slots: list[Slot] = []
    for half in halves:
        own = [_slot_of(cut) for cut in half.cuts]
        for slot in dict.fromkeys(own):
            slots += [slot] * (own.count(slot) - slots.count(slot))
    return slots


def _slot_of(cut: Var) -> Slot:
    aval: Any = cut.aval
    return aval.shape, aval.dtype, tuple(sorted(aval.mat.varying))


def _zeros(slot: Slot) -> jax.Array:
    shape, dtype, axes = slot
    return mark_varying(jnp.zeros(shape, dtype), axes)
