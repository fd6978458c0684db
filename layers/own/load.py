"""Import a class that a config names as "module:Class".

A module is looked for where Python looks for it (installed packages, PYTHONPATH), and last in the current directory,
which `python -m` looks in too. It is never looked for beside a config or in the folder of a model: such folders are
downloaded, and an import runs what is in them. A module that does lie in one, since it is the current directory or on
the path, is refused. Read `make.py` next.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx

from ...meshes import ModelError
from ...meshes.errors import shown, suggest
from .check_config import OWN_CLASSES

OFFERED = ("places", "microbatch", "info")
"""Names of what a block may ask for beside x; attention may ask for `places`."""

_GIVEN = {"block": OFFERED, "attention_class": ("places",), "mlp_class": (), "norm_class": ()}
_OF_MODELS = ("*.safetensors", "*.safetensors.index.json", "checkpoints/*/seal.json")
"""What a folder with a model has: weights of Hugging Face, or the saves of a run."""


@cache
def load_class(path: str, *, key: str) -> type[Any]:
    """Return the class that is named as "module:Class"; `key` is the field of the config that names it.

    Raises:
        ModelError: there is no such module or class, the module lies in the folder of a model or cannot be imported,
            or the class is not an `nnx.Module` that is made and called as the field wants it.
    """
    module_name, _, name = path.partition(":")
    said = f"model.{key}={path!r}"
    module = _import(module_name, said)
    own = getattr(module, name, None)
    if own is None:
        known = [each for each, value in vars(module).items() if inspect.isclass(value)]
        raise ModelError(
            f"{said}: {module_name} ({getattr(module, '__file__', 'no file')}) has no {name}.{suggest(name, known)}",
            fix="name a class that the module defines.",
        )
    if not inspect.isclass(own) or not issubclass(own, nnx.Module):
        what = "is not a class" if not inspect.isclass(own) else "is not a flax.nnx.Module"
        raise ModelError(f"{said}: {name} {what}.", fix=f"write class {name}(nnx.Module).")
    _check_signatures(own, key=key, said=said)
    return own


def check_classes(config: Any) -> None:
    """Raise unless the classes that a `ModelConfig` names can be imported, made and called.

    Raises:
        ModelError: as `load_class` does.
    """
    for key in OWN_CLASSES:
        if path := getattr(config, key):
            load_class(path, key=key)


def asked_of(own: Any) -> tuple[str, ...]:
    """Return which of `OFFERED` the call of a class or module asks for, by the names of its parameters."""
    cls = own if inspect.isclass(own) else type(own)
    return tuple(name for name in OFFERED if name in inspect.signature(cls.__call__).parameters)


def _import(name: str, said: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        # Last, so that a file here never takes the place of an installed package.
        sys.path.append(here)
    importlib.invalidate_caches()
    # One package after another: to find a module Python imports the packages that it is in.
    for part in accumulate(name.split("."), "{}.{}".format):
        if part in sys.modules:
            continue
        try:
            spec = importlib.util.find_spec(part)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            raise ModelError(
                f"{said}: there is no module {part!r} on Python's path or in the current directory, {here}.",
                fix="run from the folder that has it, install it, or name its folder in PYTHONPATH.",
            )
        _check_places(spec, said)
        _run_import(part, said)
    return sys.modules[name]


def _run_import(name: str, said: str) -> None:
    try:
        importlib.import_module(name)
    except Exception as error:
        raise ModelError(
            f"{said}: importing {name} failed: {type(error).__name__}: {shown(str(error), limit=200)}",
            fix=f"correct it: python -c 'import {name}' shows where.",
        ) from error


def _check_places(spec: Any, said: str) -> None:
    """Raise if a module lies in a folder with a model, or in a folder inside of one that is on the path."""
    for folder in _folders_of(spec):
        if any(next(folder.glob(pattern), None) for pattern in _OF_MODELS):
            raise ModelError(
                f"{said}: {spec.name} lies in {folder}, a folder with a model in it, whose code is never imported.",
                fix="move the module to a folder of your own, and run from there.",
            )


def _folders_of(spec: Any) -> Iterator[Path]:
    """Yield the folder that Python found a module in, and the module's own if it is a package."""
    for place in spec.submodule_search_locations or ():
        yield from (Path(place), Path(place).parent)
    if spec.has_location and spec.origin:
        yield Path(spec.origin).parent


def _check_signatures(own: type[Any], *, key: str, said: str) -> None:
    """Raise unless a class can be called as (config, rngs=..., rules=...), and its modules as (x) and what they ask."""
    offered = _GIVEN[key]
    asked = [name for name in offered if name in inspect.signature(own.__call__).parameters]
    more = f"; it may have {', '.join(offered)} too" if offered else ""
    wanted: tuple[tuple[str, list[str], str], ...] = (
        ("__init__", ["rngs", "rules"], "def __init__(self, config, *, rngs, rules)"),
        ("__call__", asked, f"def __call__(self, x_BTD){more}"),
    )
    for method, options, written in wanted:
        signature = inspect.signature(getattr(own, method))
        try:
            # Each is called with itself and one value by position.
            signature.bind(None, None, **dict.fromkeys(options))
        except TypeError as error:
            raise ModelError(
                f"{said}: {own.__name__}.{method} has the parameters {signature}: {error}.", fix=f"write {written}."
            ) from None
