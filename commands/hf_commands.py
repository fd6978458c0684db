"""`trellax import-hf DIR OUT` and `trellax export-hf CHECKPOINT OUT`: Hugging Face folders to run folders and back."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ..configs.run_config import RunConfig, load_config
from ..hub.architectures import ARCHITECTURES
from ..hub.config import HubModel, read_hub_model
from ..hub.config_write import hub_values
from ..hub.folder import find_file
from ..hub.read import open_weights, read_weights
from ..hub.special_ids import ORIGIN
from ..hub.tokenizer import TOKENIZER, TOKENIZER_FILES, copy_tokenizer, load_tokenizer, read_origin
from ..hub.write import write_weights
from ..layers import ModelConfig, param_counts
from ..meshes import MeshSpec, build_mesh, mesh_sizes, use_fake_devices
from ..meshes.build import visible_devices
from ..meshes.errors import printable
from ..meshes.files.new_folder import new_folder, refuse_existing
from ..train.checkpoints.weights import load_params, save_params, saved_config, weight_shapes
from ..train.state import Setup

_SEQ_LEN = 1024
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the config.json that a model came with which it has on its way back."""


def run_import(args: argparse.Namespace) -> int:
    """Make a run folder of a Hugging Face folder and return the exit code.

    Raises:
        TrellaxError: the folder cannot be read, or OUT is there.
    """
    source, out = Path(args.source), Path(args.out)
    model = read_hub_model(source)
    refuse_existing(out)
    mesh = _build_mesh(args)
    with new_folder(out) as part:
        config = _write_run_folder(part, out, source, model)
        shapes = weight_shapes(Setup(config, mesh))
        open_weights(source, shapes)
        _say(f"reading   {source}: {model.architecture}, {_count(model.config)} parameters, on {mesh_sizes(mesh)}")
        save_params(part, read_weights(source, shapes, say=_say), config)
    return _finish(args, model.architecture, model.config, files=["config.toml", "checkpoints", *_tokenizer_files(out)])


def run_export(args: argparse.Namespace) -> int:
    """Write the newest weights of a run folder as a Hugging Face folder and return the exit code.

    Raises:
        TrellaxError: there is no save, no architecture holds the model, or OUT is there.
    """
    source, out = Path(args.source), Path(args.out)
    # Before a save is looked at, since that starts jax.
    mesh = _build_mesh(args)
    config, origin = saved_config(source), read_origin(source)
    values = hub_values(config.model, architecture=args.architecture or origin.get("model_type"))
    refuse_existing(out)
    _say(f"reading   {source}: {_count(config.model)} parameters, on {mesh_sizes(mesh)}")
    write_weights(
        load_params(source, weight_shapes(Setup(config, mesh))),
        config.model,
        out,
        architecture=values["model_type"],
        dtype=args.dtype or config.model.dtype,
        extra_values={key: origin[key] for key in _SPECIAL_IDS if key in origin},
        extra_files=[source / name for name in _tokenizer_files(source)],
    )
    return _finish(args, values["model_type"], config.model, files=sorted(file.name for file in out.iterdir()))


def _build_mesh(args: argparse.Namespace) -> Mesh:
    spec = MeshSpec.parse(args.mesh)
    if args.fake_devices is not None:
        use_fake_devices(args.fake_devices)
    devices = visible_devices()
    # A file is read on as many devices as are asked for, one of eight too.
    return build_mesh(spec, devices=devices if -1 in spec.sizes.values() else devices[: spec.num_devices])


def _write_run_folder(part: Path, out: Path, source: Path, model: HubModel) -> RunConfig:
    """Write config.toml and what belongs to the tokenizer, and return the run."""
    if find_file(source, TOKENIZER):
        # A run whose tokenizer cannot be read could neither train nor answer.
        for warning in load_tokenizer(source).special.warnings:
            _say(f"warning   {warning}")
    copy_tokenizer(source, part)
    (part / ORIGIN).write_text(json.dumps(model.values, indent=2) + "\n", encoding="utf-8")
    (part / "config.toml").write_text(_config_text(source, out, model), encoding="utf-8")
    return load_config(part / "config.toml")


def _config_text(source: Path, out: Path, model: HubModel) -> str:
    # Whole paths, so that the config means the same in every working directory.
    config, out = model.config, out.resolve()
    values: dict[str, dict[str, Any]] = {
        "run": {"name": out.name, "folder": str(out.parent)},
        "model": {
            field.name: getattr(config, field.name)
            for field in fields(ModelConfig)
            if getattr(config, field.name) != field.default
        },
        "data": {"seq_len": min(config.max_tokens, _SEQ_LEN)},
        "train": {"steps": 1000, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-5, "warmup_steps": 100},
    }
    if find_file(source, TOKENIZER):
        values["data"]["tokenizer"] = str(out)
    sections = [
        "\n".join(
            [f"[{section}]", *(f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in keys.items())]
        )
        for section, keys in values.items()
    ]
    # A comment ends with its line, a name need not.
    folder = printable(shlex.quote(str(out)), limit=5_000).replace("\n", "\\n")
    head = (
        f"# {ARCHITECTURES[model.architecture]}, from `trellax import-hf`; its weights are in {folder}/checkpoints.\n"
        f"# Command:  trellax train {folder}/config.toml --data.source text --data.paths 'notes/*.txt'"
    )
    return "\n\n".join([head, *sections]) + "\n"


def _tokenizer_files(folder: Path) -> list[str]:
    return [name for name in TOKENIZER_FILES if find_file(folder, name)]


def _count(config: ModelConfig) -> str:
    return f"{param_counts(config).total:,}"


def _finish(args: argparse.Namespace, architecture: str, config: ModelConfig, *, files: list[str]) -> int:
    if args.json:
        numbers = {"folder": args.out, "architecture": architecture, "parameters": param_counts(config).total}
        print(json.dumps(numbers | {"model": asdict(config), "files": files}))
        return 0
    print(f"{architecture}, {_count(config)} parameters\n{args.out}: {', '.join(files)}")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)
