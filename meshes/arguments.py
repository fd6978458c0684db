"""Check the arguments of public functions where they enter: a choice, a count, a number, an instance of a class.

Type checkers find most such mistakes, but scripts and notebooks run without one. All public functions use these checks,
so that the same mistake gives the same error everywhere.
"""

import sys
from collections.abc import Iterable
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from .errors import TrellaxError, shown, suggest


def check_choice(name: str, value: Any, choices: Iterable[Any], *, error: type[TrellaxError]) -> None:
    """Raise `error` unless the value is one of the choices; the error suggests the most similar one.

    >>> check_choice("vocab", "splitt", get_args(Vocab), error=ScheduleError)
    ScheduleError: vocab='splitt' is not a choice. Did you mean 'split'?
      Fix: use 'ends' or 'split'.

    Raises:
        TrellaxError: of the class `error`.
    """
    known = list(choices)
    # Types must agree too: True == 1.
    if not any(type(value) is type(choice) and value == choice for choice in known):
        hint = suggest(value, map(str, known)) if isinstance(value, str) else ""
        raise error(f"{name}={shown(value)} is not a choice.{hint}", fix=f"use {' or '.join(map(repr, known))}.")


def check_count(name: str, value: Any, *, error: type[TrellaxError], least: int | None = 1) -> None:
    """Raise `error` unless the value is an integer, and `least` or more if that is given; True and 2.0 are refused.

    Raises:
        TrellaxError: of the class `error`.
    """
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
        raise error(f"{name}={shown(value)} is not a whole number.", fix="give one, without quotes or a point.")
    if least is not None and value < least:
        raise error(f"{name}={shown(value)} is below {least}.", fix=f"give {least} or more.")


def check_number(name: str, value: Any, *, error: type[TrellaxError], example: float = 1.0) -> None:
    """Raise `error` unless the value is a finite number, 0 or more.

    Args:
        example: a sensible value, for the error.

    Raises:
        TrellaxError: of the class `error`.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else -1
    # Compared without conversion: an integer may be too large for a float.
    if not 0 <= number <= sys.float_info.max:
        fix = f"give a number, for example {name}={example}."
        raise error(f"{name}={shown(value)} is not a finite number of 0 or more.", fix=fix)


def check_instance(
    name: str, value: Any, kind: type | tuple[type, ...], *, error: type[TrellaxError], fix: str
) -> None:
    """Raise `error` unless the value is an instance of a class, or of one of several.

    Args:
        fix: how to make such a value.

    Raises:
        TrellaxError: of the class `error`.
    """
    if not isinstance(value, kind):
        wanted = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        # Only texts are quoted: the repr of an array or a function tells little.
        given = f"the text {shown(value)}" if isinstance(value, str) else f"a {type(value).__name__}"
        raise error(f"{name} is {given}, where a {wanted} is wanted.", fix=fix)


def check_fields(value: Any, *, error: type[TrellaxError], least: int | None = 1) -> None:
    """Check the fields of a dataclass by their annotations: `Literal` choices, `int` counts and `float` numbers.

    A field annotated with None as well may be None; fields of other types are not checked.

    Args:
        least: the smallest count; None checks only that counts are whole numbers.

    Raises:
        TrellaxError: of the class `error`.
    """
    for name, choices, kind, is_optional, example in _rules_of(type(value)):
        own = getattr(value, name)
        if own is None and is_optional:
            continue
        if choices:
            check_choice(name, own, choices, error=error)
        elif kind is int:
            check_count(name, own, error=error, least=least)
        else:
            check_number(name, own, error=error, example=example)


@cache
def _rules_of(cls: type) -> tuple[tuple[str, tuple[Any, ...], type, bool, float], ...]:
    """Return for each field to check its name, choices, int or float, whether it may be None, and an example.

    A search makes a hundred thousand layouts, so annotations are taken apart once.
    """
    found = []
    for field in fields(cls):
        kinds = _parts_of(field.type)
        choices = tuple(choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
        # A default is a sensible value, unless it is 0 for "off".
        example = (field.default if isinstance(field.default, float) else 0.0) or 1.0
        if choices or int in kinds or float in kinds:
            found.append((field.name, choices, int if int in kinds else float, NoneType in kinds, example))
    return tuple(found)


def _parts_of(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
