"""`trellax generate`: answer prompts with a trained model, and print the answers as they are decoded."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any, TextIO

from ..hub.model_folder import ModelSource
from ..hub.text_stream import TextStream, Tokenizer
from ..layers import ModelConfig
from ..meshes import ConfigError, MeshSpec, ServeError
from ..meshes.errors import shown
from ..meshes.files.regular_file import read_bounded
from ..serve import Constraint, Engine, Request, ServedSequence, check_request
from ..serve.constraints.grammars import Grammars
from ..serve.state import MAX_STOPS
from .arguments.generate import no_prompt
from .engine import apply_dtype, check_served, describe_engine, load_params, open_guesser, open_mesh, open_served

_DEFAULT_SLOTS = 8
_MAX_PROMPTS_BYTES, _MAX_SCHEMA_BYTES = 1 << 28, 1 << 20
_SEPARATOR = "\n---\n"
"""Printed between answers, which may contain blank lines."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters (C0, DEL and C1) except line ends and tabs."""


def run_generate(args: argparse.Namespace) -> int:
    """Answer the prompts, print the answers to stdout and all else to stderr, and return the exit code.

    Raises:
        TrellaxError: model, mesh and prompts do not fit each other; no weight is read then.
    """
    prompts = _read_prompts(args)
    spec, source = open_served(args)
    config = apply_dtype(source.config, args)
    requests = _make_requests(prompts, args, source)
    sizes = _engine_sizes(args, config, requests, spec)
    check_served(config, spec, sizes)
    for request in requests:
        check_request(request, config, max_tokens=sizes["max_tokens"], max_stops=sizes["max_stops"])
    _check_constraint(requests[0], config, source.tokenizer)
    guesser, mesh = open_guesser(args, config, spec, sizes), open_mesh(spec)
    start_s = time.perf_counter()
    printer = _Printer(source.tokenizer, prompts, requests, sys.stdout) if not args.json else None
    engine = Engine(
        config,
        load_params(replace(source, config=config), spec, args, mesh=mesh),
        mesh=mesh,
        axes=spec.roles,
        on_token=printer.add if printer else None,
        speculation=guesser.load(spec, mesh) if guesser else None,
        tokenizer=source.tokenizer,
        **sizes,
    )
    print(describe_engine(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    start_s = time.perf_counter()
    sequences = _answer(engine, requests, printer)
    if not args.json and args.logprobs is not None:
        print("\n".join(_logprob_lines(sequences, source.tokenizer)), file=sys.stderr)
    if args.json:
        print(json.dumps([_numbers(*pair, source.tokenizer) for pair in zip(prompts, sequences, strict=True)]))
    print(_describe_pace(engine, sequences, time.perf_counter() - start_s), file=sys.stderr)
    return 0


def _answer(engine: Engine, requests: list[Request], printer: "_Printer | None") -> list[ServedSequence]:
    sequences = [engine.submit(request) for request in requests]
    while not engine.scheduler.is_idle:
        for sequence in engine.step():
            if printer:
                printer.end(sequence)
    return sequences


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            content = read_bounded(args.prompts_file, max_bytes=_MAX_PROMPTS_BYTES, error=ConfigError)
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{args.prompts_file} cannot be read: {error}.", fix="name a text file.") from None
        # Not splitlines, which splits at form feeds too.
        prompts += [line for line in text.split("\n") if line]
    if not prompts:
        raise no_prompt()
    for text in (*prompts, *args.stop):
        if not _is_text(text):
            raise ServeError(f"{shown(text)} is not UTF-8 text.", fix="convert it, or check the locale.")
    return prompts


def _is_text(word: str) -> bool:
    """Return whether a word of the command line is UTF-8: Python decodes other bytes to surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _make_requests(prompts: list[str], args: argparse.Namespace, source: ModelSource) -> list[Request]:
    stops = [_stop_token(text, source.tokenizer) for text in args.stop]
    stops += [one for one in source.end_ids if one not in stops]
    constraint = _read_constraint(args)
    return [
        Request(
            # As in transformers, an empty prompt becomes the first token of a text.
            prompt=tuple(source.tokenizer.encode_prompt(prompt)) or source.begin_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            presence_penalty=args.presence_penalty,
            frequency_penalty=args.frequency_penalty,
            logit_bias=args.logit_bias,
            logprobs=args.logprobs,
            seed=args.seed + index,
            stop=tuple(stops),
            constraint=constraint,
        )
        for index, prompt in enumerate(prompts)
    ]


def _read_constraint(args: argparse.Namespace) -> Constraint | None:
    if args.regex is not None:
        if not _is_text(args.regex):
            raise ServeError(f"--regex {shown(args.regex)} is not UTF-8 text.", fix="convert it, or check the locale.")
        return Constraint.regex(args.regex)
    if args.json_schema is None:
        return None
    try:
        text = read_bounded(args.json_schema, max_bytes=_MAX_SCHEMA_BYTES, error=ConfigError).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{args.json_schema} cannot be read: {error}.", fix="name a JSON file.") from None
    return Constraint.json_schema(text)


def _check_constraint(request: Request, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Compile the constraint that all requests share, before weights are read."""
    if request.constraint is not None:
        Grammars(tokenizer, vocab_size=config.vocab_size).matcher(request.constraint)


def _stop_token(text: str, tokenizer: Tokenizer) -> int:
    # A line end is hard to write in most shells, so `\n` stands for one.
    tokens = tokenizer.encode(text.replace("\\n", "\n"))
    if len(tokens) != 1:
        raise ServeError(
            f"--stop {shown(text)} is {len(tokens)} tokens; an answer ends with a single one.",
            fix="give a single token, for example '\\n'.",
        )
    return tokens[0]


def _engine_sizes(
    args: argparse.Namespace, config: ModelConfig, requests: list[Request], spec: MeshSpec
) -> dict[str, Any]:
    needed = max(len(request.prompt) + request.max_new_tokens for request in requests)
    groups = args.groups or spec.pipe
    parts = spec.data * groups
    return {
        # One for each prompt, at most 8, rounded up to a multiple of groups x data shards.
        "slots": args.slots or -(-min(len(requests), _DEFAULT_SLOTS) // parts) * parts,
        "max_tokens": args.max_tokens or min(needed, config.max_tokens),
        "groups": groups,
        "chunk": args.chunk,
        # A model may have more end tokens than an engine compares with by default.
        "max_stops": max(MAX_STOPS, *(len(request.stop) for request in requests)),
        "cache_dtype": args.cache_dtype,
    }


class _Printer:
    """Print answers in the order of their prompts: the first unfinished one as it is decoded, later ones after it."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], requests: list[Request], out: TextIO) -> None:
        self._out = out
        self._streams = [TextStream(tokenizer, prompt=request.prompt) for request in requests]
        self._waiting = list(prompts)
        self._has_ended = [False] * len(prompts)
        self._first = 0

    def add(self, sequence: ServedSequence, token: int) -> None:
        """Print a token of the first unfinished answer, or keep a token of a later one."""
        self._waiting[sequence.id] += self._streams[sequence.id].add(token)
        self._show()

    def end(self, sequence: ServedSequence) -> None:
        """Print the rest of an answer, and the available text of the next ones."""
        is_last = sequence.id == len(self._streams) - 1
        self._waiting[sequence.id] += self._streams[sequence.id].finish() + ("\n" if is_last else _SEPARATOR)
        self._has_ended[sequence.id] = True
        while self._first < len(self._waiting) and self._has_ended[self._first]:
            self._show()
            self._first += 1
        if self._first < len(self._waiting):
            self._show()

    def _show(self) -> None:
        text = self._waiting[self._first]
        # A terminal would obey control characters that a model writes; files and programs get them unchanged.
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text) if self._out.isatty() else text
        # A stdout that is not UTF-8 cannot encode all characters that a model writes.
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._out.flush()
        self._waiting[self._first] = ""


def _numbers(prompt: str, sequence: ServedSequence, tokenizer: Tokenizer) -> dict[str, Any]:
    stream = TextStream(tokenizer, prompt=sequence.request.prompt)
    wanted = sequence.request.logprobs is not None
    return {
        "prompt": prompt,
        "completion": stream.add(*sequence.tokens) + stream.finish(),
        "token_ids": sequence.tokens,
        "finish_reason": sequence.finish_reason,
        **({"logprobs": [asdict(one) for one in sequence.logprobs]} if wanted else {}),
    }


def _logprob_lines(sequences: list[ServedSequence], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a line for each token of each answer: its log probability, and the likeliest tokens in its place."""

    def entry(token: int, logprob: float) -> str:
        return f"{logprob:8.3f} {token:6} {tokenizer.decode([token])!r}"

    for index, sequence in enumerate(sequences):
        yield f"logprobs of answer {index}"
        for one in sequence.logprobs:
            top = "".join(f"   | {entry(*pair).lstrip()}" for pair in one.top)
            yield entry(one.token, one.logprob) + top


def _describe_pace(engine: Engine, sequences: list[ServedSequence], seconds: float) -> str:
    num_tokens = sum(len(sequence.tokens) for sequence in sequences)
    usage, guessed = engine.usage, ""
    if usage.guessed_tokens:
        guessed = f"; {usage.accepted_share:.0%} of {usage.guessed_tokens} guessed tokens were right"
    return (
        f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:,.1f} tokens/s; "
        f"stages idle {usage.idle_share:.0%} of the ticks{guessed}"
    )
