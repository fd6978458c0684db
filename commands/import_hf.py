"""`trellax import-hf DIR OUT`: create a run folder from a Hugging Face folder, to train or serve."""

import argparse
import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..configs.run_config import RunConfig, load_config
from ..hub.architectures import ARCHITECTURES
from ..hub.cached_folder import find_model_folder
from ..hub.config import HubModel, read_hub_model
from ..hub.folder import find_file
from ..hub.read import open_weights, read_weights
from ..hub.special_ids import ORIGIN
from ..hub.tokenizer import TOKENIZER, load_tokenizer
from ..hub.tokenizer_files import copy_tokenizer
from ..layers import ModelConfig
from ..meshes.errors import printable
from ..meshes.files.new_folder import new_folder, refuse_existing
from ..train.checkpoints.initial_weights import save_params, weight_shapes
from .hf_folders import count_text, list_tokenizer_files, print_result, read_asked_mesh, say, setup_on

_SEQ_LEN = 1024


def run_import(args: argparse.Namespace) -> int:
    """Create the run folder and return the exit code.

    Raises:
        TrellaxError: the Hugging Face folder cannot be read, or OUT exists.
    """
    source, out = find_model_folder(args.source), Path(args.out)
    model = read_hub_model(source)
    refuse_existing(out)
    spec = read_asked_mesh(args)
    with new_folder(out) as part:
        config = _write_run_folder(part, out, source, model)
        shapes = weight_shapes(setup_on(spec, config))
        open_weights(source, shapes)
        say(f"reading   {source}: {model.architecture}, {count_text(model.config)} parameters, on {spec}")
        save_params(part, read_weights(source, shapes, say=say), config)
    files = ["config.toml", "checkpoints", *list_tokenizer_files(out)]
    print_result(args, model.architecture, model.config, files=files)
    return 0


def _write_run_folder(part: Path, out: Path, source: Path, model: HubModel) -> RunConfig:
    """Write config.toml and the files of the tokenizer, and return the config."""
    if find_file(source, TOKENIZER):
        # Loaded to fail here: with a broken tokenizer the run could neither train nor answer.
        for warning in load_tokenizer(source).special.warnings:
            say(f"warning   {warning}")
    copy_tokenizer(source, part)
    (part / ORIGIN).write_text(json.dumps(model.values, indent=2) + "\n", encoding="utf-8")
    (part / "config.toml").write_text(_config_text(source, out, model), encoding="utf-8")
    return load_config(part / "config.toml")


def _config_text(source: Path, out: Path, model: HubModel) -> str:
    # Absolute paths, so that the config works in every working directory.
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
    # The name of a folder may contain a line end, which would end the comment.
    folder = printable(shlex.quote(str(out)), limit=5_000).replace("\n", "\\n")
    class_name = ARCHITECTURES[model.architecture].class_name
    head = (
        f"# {class_name}, from `trellax import-hf`; its weights are in {folder}/checkpoints.\n"
        f"# Command:  trellax train {folder}/config.toml --data.source text --data.paths 'notes/*.txt'"
    )
    return "\n\n".join([head, *sections]) + "\n"
