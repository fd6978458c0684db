"""`trellax export-hf CHECKPOINT OUT`: write the newest weights of a run folder as a Hugging Face folder."""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from ..configs.run_config import RunConfig
from ..configs.saved_config import load_saved_config
from ..hub.adapters import adapters_of, without_lora
from ..hub.byte_tokenizer import reads_bytes, write_byte_tokenizer
from ..hub.cached_folder import find_model_folder
from ..hub.config_write import hub_values
from ..hub.model_folder import load_params
from ..hub.peft.write import write_adapters
from ..hub.run_params import read_adapters
from ..hub.tokenizer_files import read_origin
from ..hub.write import write_weights
from ..meshes import WeightsError
from ..meshes.files.new_folder import refuse_existing
from ..train.checkpoints.initial_weights import weight_shapes
from .arguments.ema import chosen_weights
from .hf_folders import count_text, list_tokenizer_files, print_result, read_asked_mesh, say, setup_on

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that are copied from the config.json that a model was imported with."""


def run_export(args: argparse.Namespace) -> int:
    """Write the folder and return the exit code.

    Raises:
        TrellaxError: there is no save, no architecture supports the model, or OUT exists.
    """
    source, out = Path(args.source), Path(args.out)
    # First, since fake devices must be chosen before jax starts.
    spec = read_asked_mesh(args)
    config, origin = load_saved_config(source), read_origin(source)
    if args.adapters:
        return _export_adapters(args, config, architecture=args.architecture or origin.get("model_type"))
    # Adapters are merged by whoever reads the weights without them.
    config = config.model_copy(update={"model": without_lora(config.model)})
    values = hub_values(config.model, architecture=args.architecture or origin.get("model_type"))
    refuse_existing(out)
    say(f"reading   {source}: {count_text(config.model)} parameters, on {spec}")
    with TemporaryDirectory() as place:
        write_weights(
            load_params(source, weight_shapes(setup_on(spec, config)), weights=chosen_weights(args)),
            config.model,
            out,
            architecture=values["model_type"],
            dtype=args.dtype or config.model.dtype,
            extra_values={key: origin[key] for key in _SPECIAL_IDS if key in origin},
            extra_files=_tokenizer_files(source, config, Path(place)),
        )
    print_result(args, values["model_type"], config.model, files=sorted(file.name for file in out.iterdir()))
    return 0


def _tokenizer_files(source: Path, config: RunConfig, place: Path) -> list[Path]:
    """Return the tokenizer files of a run; those of bytes are written into a folder."""
    if reads_bytes(source, data=config.data.model_dump(), vocab_size=config.model.vocab_size):
        return write_byte_tokenizer(place)
    return [source / name for name in list_tokenizer_files(source)]


def _export_adapters(args: argparse.Namespace, config: RunConfig, *, architecture: str | None) -> int:
    """Write the adapters of a run as a folder of PEFT, and return the exit code."""
    source, out, model = Path(args.source), Path(args.out), config.model
    if not model.lora_rank:
        raise WeightsError(
            f"{source} was trained with model.lora_rank=0: it has no adapters.", fix="leave --adapters out."
        )
    refuse_existing(out)
    shapes = adapters_of(weight_shapes(setup_on(read_asked_mesh(args), config)))
    given = config.train.init_from
    # The name on the hub is known to PEFT as well; a folder is found from anywhere by its whole path.
    base = str(Path(given).resolve()) if find_model_folder(given) == Path(given) else given
    adapters = read_adapters(source, lambda _: shapes, weights=chosen_weights(args))
    write_adapters(adapters, model, out, base=base, architecture=architecture)
    print_result(args, "peft", model, files=sorted(file.name for file in out.iterdir()))
    return 0
