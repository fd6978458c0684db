"""What help, version and mistakes import: modules are counted, since seconds depend on the machine."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy", "matplotlib", "tensorboardX", "treescope"}

LIGHT = """
import contextlib, io, sys
from trellax.commands.cli import main
for words in {words!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words.split())
        except SystemExit as left:
            code = left.code or 0
    loaded = sorted({heavy!r} & set(sys.modules))
    print(words, code, *loaded, sep="|")
"""

WORDS = {
    "--version": 0,
    "--help": 0,
    "traim": 2,
    "": 2,
    "--hepl": 2,
    "schedule --help": 0,
    "schedule --rank 3": 2,
    "schedule": 2,
    "schedule 1f1c": 2,
    "plan quickstart --topology h100xx": 2,
    "checkpoints --help": 0,
    "train --help": 0,
    "describe --help": 0,
    "plan --help": 0,
    "inspect --help": 0,
    "generate --help": 0,
    "generate runs --tok-p 3": 2,
    "generate runs": 2,
    "generate nowhere --prompt x": 2,
    "serve --help": 0,
    "serve nowhere": 2,
    "serve . --port 70000": 2,
    "bench-decode --help": 0,
    "calibrate --help": 0,
    "calibrate machine.json": 2,
    "import-hf --help": 0,
    "export-hf runs": 2,
    "train nowhere": 2,
    "train quickstart --fersh": 2,
    "train quickstart --mesh.tensro 2": 2,
    "plan quickstart --train.steps many": 2,
}


def test_help_version_and_mistakes_import_nothing_heavy() -> None:
    text = LIGHT.format(words=list(WORDS), heavy=HEAVY)
    run = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines() == [f"{words}|{code}" for words, code in WORDS.items()]


@pytest.mark.parametrize(
    "package", ["meshes", "layers", "pipeline", "programs", "plan", "hub", "configs", "train", "serve"]
)
def test_every_public_name_is_there(package: str) -> None:
    module = import_module(f"trellax.{package}")
    assert [name for name in module.__all__ if inspect.ismodule(getattr(module, name))] == []
