"""Read the mesh that `import-hf` and `export-hf` hold the weights on, and print what they wrote."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ..configs.run_config import RunConfig
from ..hub.folder import find_file
from ..hub.tokenizer_files import TOKENIZER_FILES
from ..layers import ModelConfig, param_counts
from ..meshes import MeshSpec, use_fake_devices
from ..train.state import Setup
from .engine import open_mesh, resolve_mesh


def read_asked_mesh(args: argparse.Namespace) -> MeshSpec:
    """Return the mesh of `--mesh`, after starting the fake devices that are asked for.

    Raises:
        MeshError: `--mesh` is not a mesh.
    """
    if args.fake_devices is not None:
        use_fake_devices(args.fake_devices)
    return resolve_mesh(args.mesh)


def setup_on(spec: MeshSpec, config: RunConfig) -> Setup:
    """Return the setup of a config on another mesh than its own, over the first of the devices.

    Raises:
        MeshError: there are fewer devices than the mesh has.
    """
    return Setup(config.model_copy(update={"mesh": spec}), open_mesh(spec))


def list_tokenizer_files(folder: Path) -> list[str]:
    """Return the names of a folder's files that belong to a tokenizer."""
    return [name for name in TOKENIZER_FILES if find_file(folder, name)]


def count_text(config: ModelConfig) -> str:
    """Return the number of a model's parameters as text."""
    return f"{param_counts(config).total:,}"


def print_result(args: argparse.Namespace, architecture: str, config: ModelConfig, *, files: list[str]) -> None:
    """Print what was written, as text or as JSON."""
    if args.json:
        numbers = {"folder": args.out, "architecture": architecture, "parameters": param_counts(config).total}
        print(json.dumps(numbers | {"model": asdict(config), "files": files}))
        return
    print(f"{architecture}, {count_text(config)} parameters\n{args.out}: {', '.join(files)}")


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(text, file=sys.stderr)
