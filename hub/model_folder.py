"""Open a run folder or a Hugging Face folder: read config and tokenizer at once, weights when asked for.

Read `run_params.py` for the weights in a run folder, and `read.py` for those in a Hugging Face folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from ..layers import ModelConfig
from ..meshes import CheckpointError
from .adapters import merge_adapters, without_adapters, without_lora
from .byte_tokenizer import reads_bytes
from .cached_folder import find_model_folder
from .config import read_hub_model
from .folder import check_model_folder, find_file
from .frozen_kernels import FrozenKernels
from .peft.read import base_of, is_peft_folder, open_adapters, read_adapters
from .read import read_weights
from .run_params import Weights, check_weights, is_run_folder, read_run_params, run_saves, say_on_stderr
from .saved_model import read_saved_model
from .saves.names import FOLDER
from .saves.paths import path_text
from .saves.reader import SaveReader
from .text_stream import ByteTokenizer, Tokenizer
from .tokenizer import TOKENIZER, ModelTokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model whose weights are not read yet.

    Args:
        config: the model.
        tokenizer: converts text to token ids and back.
        end_ids: ids of the tokens that end an answer.
        read: reads the parameters with given shapes, dtypes and shardings, a tree {"embed", "blocks", "head"} of
            `jax.ShapeDtypeStruct`, blocks [L, ...]; takes `each` as `load_params` does.
        begin_ids: prompt to use in place of an empty one; empty if no file of the folder names a first token.
        warnings: a line for every two files of the folder that differ.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    read: Callable[..., Any]
    begin_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


def open_model(folder: str | Path, *, weights: Weights = "last") -> ModelSource:
    """Return the model in a folder, its weights not read yet.

    >>> source = open_model("runs/quickstart")
    >>> source.tokenizer.encode("hi")
    [104, 105]

    Args:
        weights: which weights of a run to read, those of its last step or their average.

    Raises:
        CheckpointError: there is no such folder, no model in it, or a run without a save or without a tokenizer.
        WeightsError: the Hugging Face model is broken or not supported.
        DataError: its tokenizer is missing or broken.
    """
    check_weights(weights)
    folder = find_model_folder(folder)
    if is_run_folder(folder):
        return _open_run(folder, weights)
    if weights == "ema":
        raise _no_average(folder)
    if is_peft_folder(folder):
        return replace(open_model(open_adapters(folder).base), read=partial(load_params, folder))
    check_model_folder(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds no model: neither {FOLDER} of a run nor the config.json of a Hugging Face model.",
            fix="train into it first, or name another folder.",
        )
    model = read_hub_model(folder)
    return _with_tokenizer(load_tokenizer(folder), model.config, read=partial(load_params, folder))


def _no_average(folder: str | Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} is no run folder: only a run holds an average of its weights.",
        fix="leave the choice of weights out.",
    )


def load_params(
    folder: str | Path,
    shapes: dict[str, Any],
    *,
    weights: Weights = "last",
    each: Callable[[str, jax.Array], Any] | None = None,
) -> dict[str, Any]:
    """Return the parameters in a run folder (its newest save) or a Hugging Face folder, each device reading its part.

    A damaged save is reported on stderr, and the one before it is read. A folder of PEFT holds adapters alone: they are
    merged into the weights of its base.

    Args:
        shapes: the parameters wanted, a tree {"embed", "blocks", "head"} of `jax.ShapeDtypeStruct` with shardings,
            blocks [L, ...]; such as `trellax.serve.param_shapes` or `trellax.train.weight_shapes` returns.
        weights: which weights of a run, those of its last step or their average.
        each: as of `read_weights`. Of a Hugging Face folder one parameter is read and given to it after another, of
            others all are read first.

    Raises:
        CheckpointError: the run folder has no whole save, one of another model, or no average.
        WeightsError: the Hugging Face folder is incomplete, or of another model.
    """
    check_weights(weights)
    folder = find_model_folder(folder)
    if each is not None and (is_run_folder(folder) or is_peft_folder(folder)):
        change = lambda path, leaf: each(path_text(path), leaf)  # noqa: E731
        return jax.tree_util.tree_map_with_path(change, load_params(folder, shapes, weights=weights))
    if is_run_folder(folder):
        return read_run_params(folder, shapes, weights=weights)
    if weights == "ema":
        raise _no_average(folder)
    if is_peft_folder(folder):
        opened = open_adapters(folder)
        config, adapters = read_adapters(opened, read_model_config(opened.base), shapes)
        return merge_adapters(load_params(opened.base, shapes), adapters, config=config)
    return read_weights(folder, shapes, say=say_on_stderr, **({} if each is None else {"each": each}))


def read_base(folder: str | Path, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return the frozen weights under the adapters of a model, each kernel held as the shapes say once it is read.

    Args:
        folder: a folder of weights, or of PEFT, whose base is read.
        shapes: shapes of the whole model; adapters among them are left out.

    Raises:
        TrellaxError: as `load_params` does.
    """
    folder, frozen = find_model_folder(folder), FrozenKernels(without_adapters(shapes))
    return frozen.unpack(load_params(base_of(folder), frozen.plain, each=frozen.hold))


def read_model_config(folder: str | Path) -> ModelConfig:
    """Read the `ModelConfig` of a run folder (its newest save) or a Hugging Face folder.

    Raises:
        CheckpointError: the run folder has no whole save, or one with unknown model keys.
        WeightsError: the Hugging Face model is broken or not supported.
    """
    folder = find_model_folder(folder)
    if is_peft_folder(folder):
        return read_model_config(open_adapters(folder).base)
    # A run that trained adapters is read as the model that they are merged into.
    return _read_run(folder)[0] if is_run_folder(folder) else read_hub_model(folder).config


def _open_run(folder: Path, weights: Weights) -> ModelSource:
    config, data = _read_run(folder)
    read = partial(load_params, folder, weights=weights)
    if find_file(folder, TOKENIZER):
        return _with_tokenizer(load_tokenizer(folder), config, read=read)
    if not reads_bytes(folder, data=data, vocab_size=config.vocab_size):
        raise CheckpointError(
            f"the model in {folder} reads token ids, and there is no {TOKENIZER} that says what text they are.",
            fix=f"copy the model's {TOKENIZER} there, or use trellax.serve.Engine with token ids of your own.",
        )
    return ModelSource(config=config, tokenizer=ByteTokenizer(), end_ids=(), read=read)


def _read_run(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the model of the newest save, and the `data` section of its config."""
    saves = run_saves(folder)
    seal = SaveReader(folder=saves).require_newest()
    return without_lora(read_saved_model(seal, folder=saves / seal.step)), dict(seal.config.get("data", {}))


def _with_tokenizer(tokenizer: ModelTokenizer, config: ModelConfig, *, read: Callable[[Any], Any]) -> ModelSource:
    """Return the model with its tokenizer; special ids at or above the vocabulary size are left out."""
    special, begin = tokenizer.special, tokenizer.special.begin_id
    return ModelSource(
        config=config,
        tokenizer=tokenizer,
        end_ids=tuple(one for one in special.stop_ids if one < config.vocab_size),
        begin_ids=() if begin is None or begin >= config.vocab_size else (begin,),
        warnings=special.warnings,
        read=read,
    )
