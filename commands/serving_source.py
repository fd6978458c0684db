"""What can be served: a folder with a model in it, its config and tokenizer read first, its weights only when asked.

A run of `trellax train` or `trellax import-hf`, or a Hugging Face model as it is. Read `../commands/generate.py` next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from ..hub.config import read_hub_model
from ..hub.folder import check_model_folder, find_file
from ..hub.saves.names import FOLDER
from ..hub.special_ids import ORIGIN
from ..hub.text_stream import ByteTokenizer, Tokenizer
from ..hub.tokenizer import TOKENIZER, ModelTokenizer, load_tokenizer
from ..layers import ModelConfig
from ..meshes import CheckpointError, ConfigError
from ..meshes.arguments import check_choice
from ..serve import param_shapes
from ..train.checkpoints.weights import is_run_folder, load_params, saved_config

_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model that is not read yet: `read(shapes)` returns parameters of the shapes and shardings it is given.

    `end_ids` are the tokens that end an answer, `begin_ids` those that a text of no token begins with, none where
    nothing says so. `warnings` is where the files of a folder differ, a line each.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    end_ids: tuple[int, ...]
    read: Callable[[Any], Any]
    begin_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


def open_source(path: str | Path) -> Source:
    """Return the model in a folder.

    Raises:
        CheckpointError: there is no such folder, no model in it, or a run without a save or without a tokenizer.
        WeightsError: the Hugging Face folder holds no model that trellax has.
        DataError: its tokenizer is missing or broken.
    """
    folder = Path(path)
    if is_run_folder(folder):
        return _open_run(folder)
    check_model_folder(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} holds no model: neither {FOLDER} of a run nor the config.json of a Hugging Face model.",
            fix="train into it first, or name another folder.",
        )
    model = read_hub_model(folder)
    return _with_tokenizer(load_tokenizer(folder), model.config, read=partial(load_params, folder))


def load_for_serving(
    path: str | Path, *, mesh: Mesh, dtype: Literal["float32", "bfloat16"] | None = None
) -> tuple[Source, Any]:
    """Return the model in a folder and its parameters on a mesh, each device having read its own part.

    Args:
        dtype: to compute in; the model's own if left out.

    Raises:
        TrellaxError: there is no model, or it does not fit the mesh; then nothing was read.
    """
    check_choice("dtype", dtype, (None, "float32", "bfloat16"), error=ConfigError)
    source = open_source(path)
    # The config too: an engine is made of both.
    config = replace(source.config, dtype=dtype or source.config.dtype)
    return replace(source, config=config), source.read(param_shapes(config, mesh=mesh))


def _open_run(folder: Path) -> Source:
    run, read = saved_config(folder), partial(load_params, folder)
    if find_file(folder, TOKENIZER):
        return _with_tokenizer(load_tokenizer(folder), run.model, read=read)
    has_other_ids = (
        run.data.source == "tokens" or run.data.tokenizer != "bytes" or find_file(folder, ORIGIN) is not None
    )
    if has_other_ids or run.model.vocab_size < _BYTES:
        raise CheckpointError(
            f"the model in {folder} reads token ids, and there is no {TOKENIZER} that says what text they are.",
            fix=f"copy the model's {TOKENIZER} there, or use trellax.serve.Engine with token ids of your own.",
        )
    return Source(config=run.model, tokenizer=ByteTokenizer(), end_ids=(), read=read)


def _with_tokenizer(tokenizer: ModelTokenizer, config: ModelConfig, *, read: Callable[[Any], Any]) -> Source:
    """The model with its tokenizer, which may have ids that the model does not: those are refused where they occur."""
    special, begin = tokenizer.special, tokenizer.special.begin_id
    return Source(
        config=config,
        tokenizer=tokenizer,
        end_ids=tuple(one for one in special.stop_ids if one < config.vocab_size),
        begin_ids=() if begin is None or begin >= config.vocab_size else (begin,),
        warnings=special.warnings,
        read=read,
    )
