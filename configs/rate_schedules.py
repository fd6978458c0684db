"""Read `optimizer.lr_schedule`: a name of ours, or a call of a factory of `optax.schedules` with its arguments.

    cosine
    polynomial_schedule(init_value=1.0, end_value=0.1, power=2, transition_steps=1000)
    join_schedules([constant_schedule(1.0), exponential_decay(1.0, 100, 0.9)], boundaries=[500])

The text is parsed, not run: arguments are numbers, texts, lists, tables, and calls like these. What a schedule returns
is a share of `optimizer.learning_rate`. optax is imported where a config names one of its schedules.
"""

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from ..meshes import ConfigError, TrellaxError
from ..meshes.errors import shown, suggest
from .run_config import RunConfig
from .sections import OwnSchedule

OWN_SCHEDULES: tuple[str, ...] = get_args(OwnSchedule)
"""Names of the schedules that are ours, which take no arguments."""

_KEY = "optimizer.lr_schedule"
_EXAMPLE = "polynomial_schedule(init_value=1.0, end_value=0.1, power=2, transition_steps=1000)"

Rate = Callable[[Any], Any]
"""A function step -> share of the peak learning rate."""


def make_optax_schedule(text: str) -> Rate:
    """Return the schedule that a call says, of optax.

    >>> make_optax_schedule("linear_schedule(1.0, 0.5, transition_steps=10)")(5)
    Array(0.75, dtype=float32, weak_type=True)

    Raises:
        ConfigError: it is no call of a factory of `optax.schedules`, or its arguments are others than it takes.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise _no_call(text) from None
    if not isinstance(tree, ast.Call):
        name = tree.id if isinstance(tree, ast.Name) else text
        if name in optax_schedules():
            raise ConfigError(
                f"{_KEY}={shown(text)} has no arguments: {_describe(name)}.", fix=f"write a call, such as {_EXAMPLE}."
            )
        raise _unknown(name)
    return _call(tree)


def optax_schedules() -> Mapping[str, Callable[..., Rate]]:
    """Return the factories of `optax.schedules` by name, those that take schedules too."""
    from optax import schedules

    found = {name: own for name, own in vars(schedules).items() if inspect.isfunction(own)}
    return {name: own for name, own in sorted(found.items()) if not name.startswith(("_", "inject"))}


def find_rate_errors(config: RunConfig) -> Iterator[TrellaxError]:
    """Yield an error unless the learning rate has a schedule, whose decay fits beside the warm-up."""
    section, steps = config.optimizer, config.train.steps
    if section.lr_schedule not in OWN_SCHEDULES:
        try:
            make_optax_schedule(section.lr_schedule)
        except ConfigError as error:
            yield error
    if section.decay_steps and section.lr_schedule != "wsd":
        yield ConfigError(
            f"optimizer.decay_steps={section.decay_steps} is for optimizer.lr_schedule='wsd' alone; "
            f"{shown(section.lr_schedule)} takes none.",
            fix="leave it out, or set optimizer.lr_schedule='wsd'.",
        )
    elif section.warmup_steps <= steps < section.warmup_steps + section.decay_steps:
        yield ConfigError(
            f"optimizer.warmup_steps={section.warmup_steps} and optimizer.decay_steps={section.decay_steps} are more "
            f"than train.steps={steps} together.",
            fix=f"set optimizer.decay_steps={max(1, steps - section.warmup_steps)} or less.",
        )


def _call(tree: ast.Call) -> Rate:
    name = tree.func.id if isinstance(tree.func, ast.Name) else ast.unparse(tree.func)
    factories = optax_schedules()
    if name not in factories:
        raise _unknown(name)
    if any(isinstance(own, ast.Starred) for own in tree.args) or any(own.arg is None for own in tree.keywords):
        raise _no_call(ast.unparse(tree))
    args = [_value(own) for own in tree.args]
    named = {str(own.arg): _value(own.value) for own in tree.keywords}
    _check_arguments(name, factories[name], args, named)
    try:
        return factories[name](*args, **named)
    # optax checks some values, and fails by chance on others.
    except Exception as error:
        raise ConfigError(
            f"{_KEY}: optax refuses {shown(ast.unparse(tree))}: {error}", fix=f"give {_describe(name)}."
        ) from None


def _value(tree: ast.expr) -> Any:
    """Return the value of an argument: a schedule for a call, else what is written."""
    if isinstance(tree, ast.Call):
        return _call(tree)
    if isinstance(tree, ast.List | ast.Tuple):
        return [_value(own) for own in tree.elts]
    try:
        return ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ConfigError(
            f"{_KEY}: {shown(ast.unparse(tree))} is no value: an argument is a number, a text, a list, a table "
            "{100: 0.5}, or a schedule.",
            fix=f"write numbers out, such as {_EXAMPLE}.",
        ) from None


def _check_arguments(name: str, factory: Callable[..., Rate], args: list[Any], named: Mapping[str, Any]) -> None:
    signature = inspect.signature(factory)
    for own in named:
        if own not in signature.parameters:
            raise ConfigError(
                f"{_KEY}: {name} has no argument {shown(own)}.{suggest(own, signature.parameters)}",
                fix=f"give {_describe(name)}.",
            )
    try:
        signature.bind(*args, **named)
    except TypeError as error:
        raise ConfigError(f"{_KEY}: {name}: {error}.", fix=f"give {_describe(name)}.") from None


def _describe(name: str) -> str:
    """Return the arguments of a factory, with the defaults of those that may be left out."""
    parameters = inspect.signature(optax_schedules()[name]).parameters.values()
    texts = [own.name if own.default is own.empty else f"{own.name}={own.default}" for own in parameters]
    return f"{name}({', '.join(texts)})"


def _unknown(name: str) -> ConfigError:
    known = (*OWN_SCHEDULES, *optax_schedules())
    return ConfigError(
        f"{_KEY}: {shown(name)} is no schedule.{suggest(name, known)}",
        fix=f"use {', '.join(OWN_SCHEDULES)}, or a call of optax's {', '.join(optax_schedules())}.",
    )


def _no_call(text: str) -> ConfigError:
    return ConfigError(
        f"{_KEY}={shown(text)} is neither a name nor a call with arguments.",
        fix=f"use {', '.join(OWN_SCHEDULES)}, or write {_EXAMPLE}.",
    )
