"""Read the form that `--json-schema` or `--regex` gives to answers."""

import argparse

from ...hub.text_stream import Tokenizer
from ...layers import ModelConfig
from ...meshes import ConfigError, ServeError
from ...meshes.errors import shown
from ...meshes.files.regular_file import read_bounded
from ...serve import Constraint
from ...serve.constraints.grammars import Grammars
from .answer_text import is_text

_MAX_SCHEMA_BYTES = 1 << 20


def read_constraint(args: argparse.Namespace) -> Constraint | None:
    """Return the form of answers, None if none is given.

    Raises:
        TrellaxError: the file cannot be read, or it is no such form.
    """
    if args.regex is not None:
        if not is_text(args.regex):
            raise ServeError(f"--regex {shown(args.regex)} is not UTF-8 text.", fix="convert it, or check the locale.")
        return Constraint.regex(args.regex)
    if args.json_schema is None:
        return None
    try:
        text = read_bounded(args.json_schema, max_bytes=_MAX_SCHEMA_BYTES, error=ConfigError).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{args.json_schema} cannot be read: {error}.", fix="name a JSON file.") from None
    return Constraint.json_schema(text)


def check_constraint(constraint: Constraint | None, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Compile the constraint that all requests share, before weights are read.

    Raises:
        ServeError: no answer of the model can have this form.
    """
    if constraint is not None:
        Grammars(tokenizer, vocab_size=config.vocab_size).matcher(constraint)
