"""`trellax generate`: answer prompts with a trained model, and print the answers as they are decoded."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, TextIO

from ..hub.model_folder import ModelSource
from ..hub.text_stream import Tokenizer
from ..layers import ModelConfig
from ..meshes import ConfigError, MeshSpec, ServeError
from ..meshes.errors import shown
from ..meshes.files.regular_file import read_bounded
from ..serve import Engine, Request, ServedSequence, check_request
from ..serve.state import MAX_STOPS
from .arguments.generate import no_prompt
from .engine import apply_dtype, check_served, describe_engine, load_params, open_guesser, open_mesh, open_served
from .generation.answer_text import AnswerText, cancel_stopped, is_text, read_stops, write_text
from .generation.chat import run_chat
from .generation.constraint import check_constraint, read_constraint
from .generation.requests import make_request

_DEFAULT_SLOTS = 8
_NEW_TOKENS = 64
_MAX_PROMPTS_BYTES = 1 << 28
_SEPARATOR = "\n---\n"
"""Printed between answers, which may contain blank lines."""


def run_generate(args: argparse.Namespace) -> int:
    """Answer the prompts, print the answers to stdout and all else to stderr, and return the exit code.

    Raises:
        TrellaxError: model, mesh and prompts do not fit each other; no weight is read then.
    """
    prompts, stops = _read_prompts(args), read_stops(args.stop)
    if args.chat:
        return run_chat(args, prompts)
    spec, source = open_served(args)
    config = apply_dtype(source.config, args)
    requests = _make_requests(prompts, args, source, stops)
    sizes = _engine_sizes(args, config, requests, spec)
    check_served(config, spec, sizes)
    for request in requests:
        check_request(request, config, max_tokens=sizes["max_tokens"], max_stops=sizes["max_stops"])
    check_constraint(requests[0].constraint, config, source.tokenizer)
    guesser, mesh = open_guesser(args, config, spec, sizes), open_mesh(spec)
    start_s = time.perf_counter()
    printer = _Printer(source.tokenizer, prompts, requests, None if args.json else sys.stdout, stops)
    engine = Engine(
        config,
        load_params(replace(source, config=config), spec, args, mesh=mesh),
        mesh=mesh,
        axes=spec.roles,
        on_token=printer.add,
        speculation=guesser.load(spec, mesh) if guesser else None,
        tokenizer=source.tokenizer,
        **sizes,
    )
    print(describe_engine(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    start_s = time.perf_counter()
    sequences = _answer(engine, requests, printer)
    if not args.json and args.logprobs is not None:
        print("\n".join(_logprob_lines(sequences, printer.answers, source.tokenizer)), file=sys.stderr)
    if args.json:
        print(json.dumps([_numbers(*own) for own in zip(prompts, sequences, printer.answers, strict=True)]))
    print(_describe_pace(engine, sequences, time.perf_counter() - start_s), file=sys.stderr)
    return 0


def _answer(engine: Engine, requests: list[Request], printer: "_Printer") -> list[ServedSequence]:
    sequences = [engine.submit(request) for request in requests]
    while not engine.scheduler.is_idle:
        for sequence in engine.step():
            printer.end(sequence)
        cancel_stopped(engine, sequences, printer.answers)
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
    if not prompts and not args.chat:
        raise no_prompt()
    for text in (*prompts, *args.stop, args.system or ""):
        if not is_text(text):
            raise ServeError(f"{shown(text)} is not UTF-8 text.", fix="convert it, or check the locale.")
    return prompts


def _make_requests(
    prompts: list[str], args: argparse.Namespace, source: ModelSource, stops: Sequence[str]
) -> list[Request]:
    most = _NEW_TOKENS if args.max_new_tokens is None else args.max_new_tokens
    given: dict[str, Any] = {"source": source, "stops": stops, "max_new_tokens": most}
    given["constraint"] = read_constraint(args)
    return [
        # As in transformers, an empty prompt becomes the first token of a text.
        make_request(source.tokenizer.encode_prompt(prompt) or source.begin_ids, args, index=index, **given)
        for index, prompt in enumerate(prompts)
    ]


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
    """Print answers in the order of their prompts: the first unfinished one as it is decoded, later ones after it.

    Args:
        out: None prints nothing, and keeps the texts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: list[str],
        requests: list[Request],
        out: TextIO | None,
        stops: Sequence[str] = (),
    ) -> None:
        self._out = out
        self.answers = [AnswerText(tokenizer, request, stops) for request in requests]
        self._waiting = list(prompts)
        self._has_ended = [False] * len(prompts)
        self._first = 0

    def add(self, sequence: ServedSequence, token: int) -> None:
        """Print a token of the first unfinished answer, or keep a token of a later one."""
        self._waiting[sequence.id] += self.answers[sequence.id].add(token)
        self._show()

    def end(self, sequence: ServedSequence) -> None:
        """Print the rest of an answer, and the available text of the next ones."""
        is_last = sequence.id == len(self.answers) - 1
        self._waiting[sequence.id] += self.answers[sequence.id].finish() + ("\n" if is_last else _SEPARATOR)
        self._has_ended[sequence.id] = True
        while self._first < len(self._waiting) and self._has_ended[self._first]:
            self._show()
            self._first += 1
        if self._first < len(self._waiting):
            self._show()

    def _show(self) -> None:
        if self._out is not None:
            write_text(self._out, self._waiting[self._first])
            self._waiting[self._first] = ""


def _numbers(prompt: str, sequence: ServedSequence, answer: AnswerText) -> dict[str, Any]:
    wanted = sequence.request.logprobs is not None
    return {
        "prompt": prompt,
        "completion": answer.text,
        "token_ids": answer.kept(sequence.tokens),
        "finish_reason": answer.finish_reason(sequence),
        **({"logprobs": [asdict(one) for one in answer.kept(sequence.logprobs)]} if wanted else {}),
    }


def _logprob_lines(sequences: list[ServedSequence], answers: list[AnswerText], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a line for each token of each answer: its log probability, and the likeliest tokens in its place."""

    def entry(token: int, logprob: float) -> str:
        return f"{logprob:8.3f} {token:6} {tokenizer.decode([token])!r}"

    for index, (sequence, answer) in enumerate(zip(sequences, answers, strict=True)):
        yield f"logprobs of answer {index}"
        for one in answer.kept(sequence.logprobs):
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
