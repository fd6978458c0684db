"""Jinja's sandbox, in which a template can fill neither the memory nor the time.

Jinja's own keeps a template from Python's inside; but a text that doubles in a loop, a list of all letters or a million
replaced ones fill the memory before any line has ended. So each operation that makes something asks `budget.py` first.
Operators that Jinja does not let one intercept become filters, by rewriting the template's tree:

    {{ a ~ b }}     [a, b] | _concat | _out         x[1:]    x | _slice(1, none, none)
    a == b          a | _plain == (b | _plain)      what compares takes exponential time on lists of lists
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.filters import do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .budget import (
    TooMuchError,
    bytes_of_joined,
    bytes_of_parts,
    bytes_of_replaced,
    current,
    own_bytes,
    take,
    whole_bytes,
)

MAX_NUMBER = 1 << 24
"""The largest number as an argument, which may be a width or a count."""

_MAX_WIDTH, _MAX_TIME_FORMAT = 1024, 256
_CONTAINERS = (str, bytes, list, tuple, dict, set, frozenset)
_REMOVED_FILTERS = ("center", "format", "pprint", "striptags", "urlize", "wordwrap", "xmlattr")
"""They make a text of any width from a number, or take the square of its length in time; no chat needs them."""

_PASSING = {
    "attr",
    "count",
    "d",
    "default",
    "first",
    "items",
    "last",
    "length",
    "map",
    "random",
    "reject",
    "rejectattr",
}
_PASSING |= {"select", "selectattr"}
"""Filters that make nothing of their own."""

_COMPARING = {"dictsort", "groupby", "max", "min", "sort", "sum", "unique"}
_LISTING = _COMPARING | {"batch", "join", "list", "reverse", "slice"}
"""Filters that read an iterator to its end."""

_REFUSED_METHODS = {"encode", "fromhex", "maketrans", "to_bytes", "translate"}

_CALL_BYTES = 256
"""What a call takes, for the objects that it may make."""

_OF_LETTERS = {"batch", "list", "reverse", "slice", "sort", "unique", "wordcount"}


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of templates."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        # What is constant would be computed while it compiles.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, **options)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _to_json, "indent": _indent}
        self.filters = {name: _bounded(name, run) for name, run in self.filters.items()}
        self.filters |= {"_out": _out, "_concat": _concat, "_slice": _slice, "_plain": _plain, "_made": _spend}
        self.tests = {name: _plain_arguments(run) for name, run in self.tests.items()}
        names: dict[str, Any] = self.globals
        names |= {"raise_exception": _raise, "strftime_now": _strftime_now}
        for name in ("lipsum", "cycler", "joiner"):
            del names[name]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Rewriter().visit(super()._parse(source, name, filename))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, as Jinja has it
        """Call a function, a macro or a method, such as `text.ljust(width)`."""
        if any(isinstance(value, int) and value > MAX_NUMBER for value in (*args, *kwargs.values())):
            raise TooMuchError("a number is too large")
        current().spend(_CALL_BYTES)
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (*_CONTAINERS, int, float, type)):
            # Methods that take an iterator read it to its end.
            args = tuple(take(one) if isinstance(one, Iterator) else one for one in args)
            current().require(_bound_method(owner, __obj.__name__, [*args, *kwargs.values()]))
        return _spend(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operation of a sensible size."""
        if operator == "+":
            if isinstance(left, _CONTAINERS):
                current().spend(own_bytes(left) + own_bytes(right))
            return super().call_binop(context, operator, left, right)
        if operator != "*" and not (_is_small(left) and _is_small(right)):
            raise TooMuchError(f"the operator {operator} takes small numbers alone")
        count = next((one for one in (left, right) if isinstance(one, int)), 1)
        sizes = [(4 if isinstance(one, str) else 8) * len(one) for one in (left, right) if isinstance(one, _CONTAINERS)]
        if abs(count) * (sizes[0] if sizes else 1) > (current().left if sizes else MAX_NUMBER):
            raise TooMuchError("a product is too large")
        return _spend(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item; a tuple as its key is hashed as a whole."""
        return super().getitem(obj, _plain(argument))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return `text.format` without widths that are given by values, and with small ones."""
        run = super().wrap_str_format(value)
        return None if run is None else functools.wraps(run)(functools.partial(_format, value.__self__, run))


class _Rewriter(NodeTransformer):
    """Let filters do what makes something."""

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        """Count what is written, also where it is not a part of the result."""
        self.generic_visit(node)
        node.nodes = [_apply("_out", one) for one in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        """Join texts."""
        self.generic_visit(node)
        return _apply("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        """Cut a part out."""
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        places = [
            nodes.Const(None, lineno=node.lineno) if one is None else one
            for one in (node.arg.start, node.arg.stop, node.arg.step)
        ]
        return _apply("_slice", node.node, *places)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        """Make a list."""
        self.generic_visit(node)
        return _apply("_made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        """Make a tuple, unless it is what a loop or a `set` assigns to."""
        self.generic_visit(node)
        return _apply("_made", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        """Make a dict."""
        self.generic_visit(node)
        return _apply("_made", node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        """Compare."""
        self.generic_visit(node)
        node.expr = _apply("_plain", node.expr)
        for one in node.ops:
            one.expr = _apply("_plain", one.expr)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        """Make an entry of a dict."""
        self.generic_visit(node)
        node.key = _apply("_plain", node.key)
        return node


def _apply(name: str, value: Any, *arguments: Any) -> Any:
    return nodes.Filter(value, name, [*arguments], [], None, None, lineno=value.lineno)


def _spend(made: Any) -> Any:
    if isinstance(made, _CONTAINERS):
        current().spend(own_bytes(made))
    return made


@pass_context  # so that Jinja does not apply it while it compiles
def _out(_context: Any, value: Any) -> str:
    room = current()
    if not isinstance(value, str):
        room.require(8 * whole_bytes(value))
        value = str(value)
    # By hand as `_spend` does: most of a template's time is here, and each call of a function is traced.
    size = sys.getsizeof(value)
    if size > room.left:
        room.require(size)
    room.left -= size
    return value


@pass_context
def _concat(_context: Any, values: list[Any]) -> str:
    current().require(8 * whole_bytes(values))
    return _spend("".join(map(str, values)))


@pass_context
def _slice(_context: Any, value: Any, start: Any, stop: Any, step: Any) -> Any:
    current().require(own_bytes(value))
    return _spend(value[start:stop:step])


def _plain(value: Any) -> Any:
    """Return a value of a bounded size, to compare or to hash it."""
    if isinstance(value, list | tuple | dict):
        current().require(whole_bytes(value))
    return value


def _plain_arguments(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            _plain(value)
        return run(*args, **kwargs)

    return bounded


def _bounded(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that asks for room first."""
    num_passed = 1 if hasattr(run, "jinja_pass_arg") else 0

    @functools.wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        passed, given = args[:num_passed], [*args[num_passed:]]
        if any(isinstance(value, int) and value > MAX_NUMBER // _MAX_WIDTH for value in (*given[1:], *kwargs.values())):
            raise TooMuchError("a number is too large")
        if name in _LISTING and isinstance(given[0], Iterator):
            given[0] = take(given[0])
        current().require(_bound_filter(name, given[0], [*given[1:], *kwargs.values()]))
        return _spend(run(*passed, *given, **kwargs))

    return bounded


def _bound_filter(name: str, value: Any, others: list[Any]) -> int:
    """Return an upper bound of the bytes that a filter makes."""
    bound = 8 * whole_bytes(value) + whole_bytes(*others)
    if name in _PASSING:
        bound = 0
    elif name == "replace" and len(others) > 1:
        bound = bytes_of_replaced(value, *others[:2])
    elif name == "join" and hasattr(value, "__len__"):
        bound = bytes_of_joined(value, max(map(str, others), key=len, default=""))
    elif name in _OF_LETTERS and isinstance(value, str):
        bound = bytes_of_parts(value, "")
    elif name == "indent" and isinstance(value, str):
        bound = own_bytes(value) + _MAX_WIDTH * (value.count("\n") + 1)
    elif name == "list":
        bound = own_bytes(value)
    return bound


def _bound_method(owner: Any, name: str, given: list[Any]) -> int:
    """Return an upper bound of the bytes that a method of Python's own types makes."""
    if name in _REFUSED_METHODS:
        raise TooMuchError(f"it calls {name}")
    if isinstance(owner, str):
        if name == "replace" and len(given) > 1:
            return bytes_of_replaced(owner, *given[:2])
        if name == "join" and given:
            return bytes_of_joined(given[0], owner)
        if name in {"split", "rsplit", "splitlines"}:
            return bytes_of_parts(owner, given[0] if given and name != "splitlines" else None)
        if name == "expandtabs":
            width = next((one for one in given if isinstance(one, int)), 8)
            return own_bytes(owner) + 4 * max(width, 0) * owner.count("\t")
    widths = sum(4 * one for one in given if isinstance(one, int) and one > 0)
    # Its elements are compared with what is given.
    compared = len(owner) * whole_bytes(*given) if isinstance(owner, list | tuple) else 0
    return 8 * own_bytes(owner) + 64 * whole_bytes(*given) + widths + compared


def _is_small(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MAX_WIDTH


def _format(text: str, run: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Apply `text.format`: each field may write all that is given."""
    given = [*args, *kwargs.values()]
    numbers = [number for field in re.findall(r"\{[^{}]*\}", text) for number in re.findall(r"[0-9]+", field)]
    # A field inside of another one's specification takes its width from a value.
    if any(int(number[:9]) > _MAX_WIDTH for number in numbers) or re.search(r"\{[^{}]*:[^{}]*\{", text):
        raise TooMuchError("a format has a width that is too large")
    fields = text.count("{")
    current().require(own_bytes(text) + fields * (8 * whole_bytes(*given) + 4 * _MAX_WIDTH))
    return _spend(run(*args, **kwargs))


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    return do_indent(text, min(width, 64), first, blank)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(str(message)[:_MAX_WIDTH])


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_TIME_FORMAT:
        raise TooMuchError("a format of time is too long")
    return time.strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes letters of HTML.
    return json.dumps(value, ensure_ascii=False, indent=min(indent, 8) if indent else None)
