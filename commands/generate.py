"""`trellax generate`: prompts in, text out as it comes. Read `../serve/engine.py` for what answers them."""

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from typing import Any, TextIO

import jax

from ..hub.text_stream import TextStream, Tokenizer
from ..layers import ModelConfig
from ..meshes import ConfigError, MeshSpec, ServeError, build_mesh, suggest, use_fake_devices
from ..meshes.build import visible_devices
from ..meshes.errors import shown
from ..meshes.files.regular_file import read_bounded
from ..serve import Engine, Request, ServedSequence, Sizes, check_model, check_request, param_shapes
from ..serve.state import MAX_STOPS
from .model_arguments import no_prompt
from .serving_source import Source, open_source

DTYPES = ("float32", "bfloat16")

_DEFAULT_SLOTS = 8
_LONGEST_PROMPTS = 1 << 28
_BETWEEN = "\n---\n"
"""Between two answers, which may have blank lines of their own."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Control characters but for line ends and tabs: C0, DEL and C1."""


def run_generate(args: argparse.Namespace) -> int:
    """Answer the prompts; stdout gets the answers, stderr the talk.

    Raises:
        TrellaxError: model, mesh and prompts do not fit each other; no weight was read.
    """
    prompts = _read_prompts(args)
    # Before a save is looked at, since that starts jax.
    if args.fake_devices:
        use_fake_devices(args.fake_devices)
    spec = resolve_mesh(args.mesh)
    source = open_source(args.folder)
    for warning in source.warnings:
        print(f"warning   {warning}", file=sys.stderr)
    config = served_model(source.config, args)
    requests = _make_requests(prompts, args, source)
    sizes = _engine_sizes(args, config, requests, spec)
    check_model(config, spec.sizes, max_tokens=sizes["max_tokens"])
    own = {name: sizes[name] for name in ("slots", "max_tokens", "groups", "chunk")}
    Sizes(num_shards=spec.data, items=1, rounds=1, **own)  # it checks itself
    for request in requests:
        check_request(request, config, max_tokens=sizes["max_tokens"], max_stops=sizes["max_stops"])
    mesh = open_mesh(spec)
    start_s = time.perf_counter()
    printer = _Printer(source.tokenizer, prompts, requests, sys.stdout) if not args.json else None
    engine = Engine(
        config,
        source.read(param_shapes(config, mesh=mesh)),
        mesh=mesh,
        on_token=printer.add if printer else None,
        **sizes,
    )
    print(_describe(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    start_s = time.perf_counter()
    sequences = _answer(engine, requests, printer)
    if args.json:
        print(json.dumps([_numbers(*pair, source.tokenizer) for pair in zip(prompts, sequences, strict=True)]))
    print(_sum_up(engine, sequences, time.perf_counter() - start_s), file=sys.stderr)
    return 0


def _answer(engine: Engine, requests: list[Request], printer: "_Printer | None") -> list[ServedSequence]:
    sequences = [engine.submit(request) for request in requests]
    while not engine.scheduler.is_idle:
        for sequence in engine.step():
            if printer:
                printer.end(sequence)
    return sequences


def served_model(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """Return the model as the words say to compute it.

    Raises:
        ConfigError: a type that is none.
    """
    for option, name in (("--dtype", args.dtype), ("--cache-dtype", args.cache_dtype)):
        if name is not None and name not in DTYPES:
            raise ConfigError(
                f"{option} {shown(name)}: unknown type.{suggest(name, DTYPES)}", fix=f"use {' or '.join(DTYPES)}."
            )
    return replace(config, dtype=args.dtype or config.dtype)


def resolve_mesh(text: str) -> MeshSpec:
    """Return the mesh that was asked for; an open axis takes all devices.

    Raises:
        MeshError: the words are no mesh.
    """
    spec = MeshSpec.parse(text)
    # Asked for in any case: before a model is read, since that starts jax too.
    devices = visible_devices()
    return spec.resolve(num_devices=len(devices)) if -1 in spec.sizes.values() else spec


def open_mesh(spec: MeshSpec) -> jax.sharding.Mesh:
    """Return the mesh on the first of the devices.

    Raises:
        MeshError: there are fewer devices than the mesh has.
    """
    return build_mesh(spec, devices=visible_devices()[: spec.num_devices])


def _read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            content = read_bounded(args.prompts_file, max_bytes=_LONGEST_PROMPTS, error=ConfigError)
            text = content.decode("utf-8-sig").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{args.prompts_file} cannot be read: {error}.", fix="name a text file.") from None
        # Not splitlines, which takes a form feed for the end of a line too.
        prompts += [line for line in text.split("\n") if line]
    if not prompts:
        raise no_prompt()
    for text in (*prompts, *args.stop):
        if not _is_text(text):
            raise ServeError(f"{shown(text)} is no UTF-8 text.", fix="convert it, or check the locale.")
    return prompts


def _is_text(word: str) -> bool:
    """Whether a word of the command line was text: bytes that were none come as surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def _make_requests(prompts: list[str], args: argparse.Namespace, source: Source) -> list[Request]:
    stops = [_stop_token(text, source.tokenizer) for text in args.stop]
    stops += [one for one in source.end_ids if one not in stops]
    return [
        Request(
            # As transformers has it: what is empty begins with the token that begins texts.
            prompt=tuple(source.tokenizer.encode_prompt(prompt)) or source.begin_ids,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=args.seed + index,
            stop=tuple(stops),
        )
        for index, prompt in enumerate(prompts)
    ]


def _stop_token(text: str, tokenizer: Tokenizer) -> int:
    # A shell has no easy way to write a line end.
    tokens = tokenizer.encode(text.replace("\\n", "\n"))
    if len(tokens) != 1:
        raise ServeError(
            f"--stop {shown(text)} is {len(tokens)} tokens; an answer ends with a single one.",
            fix="give one, '\\n' say.",
        )
    return tokens[0]


def _engine_sizes(
    args: argparse.Namespace, config: ModelConfig, requests: list[Request], spec: MeshSpec
) -> dict[str, Any]:
    needed = max(len(request.prompt) + request.max_new_tokens for request in requests)
    groups = args.groups or spec.pipe
    parts = spec.data * groups
    return {
        # As many as there are prompts, up to 8, and then what divides.
        "slots": args.slots or -(-min(len(requests), _DEFAULT_SLOTS) // parts) * parts,
        "max_tokens": args.max_tokens or min(needed, config.max_tokens),
        "groups": groups,
        "chunk": args.chunk,
        # A model may have more ends than an engine looks for unasked.
        "max_stops": max(MAX_STOPS, *(len(request.stop) for request in requests)),
        "cache_dtype": args.cache_dtype,
    }


class _Printer:
    """Answers on a terminal, in the order of the prompts: the first that is not done appears as it comes."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], requests: list[Request], out: TextIO) -> None:
        self._out = out
        self._streams = [TextStream(tokenizer, prompt=request.prompt) for request in requests]
        self._waiting = list(prompts)
        self._has_ended = [False] * len(prompts)
        self._first = 0

    def add(self, sequence: ServedSequence, token: int) -> None:
        """Show a token, or keep it until its prompt's turn."""
        self._waiting[sequence.id] += self._streams[sequence.id].add(token)
        self._show()

    def end(self, sequence: ServedSequence) -> None:
        """Show the rest of an answer, and what has come of those behind it."""
        is_last = sequence.id == len(self._streams) - 1
        self._waiting[sequence.id] += self._streams[sequence.id].finish() + ("\n" if is_last else _BETWEEN)
        self._has_ended[sequence.id] = True
        while self._first < len(self._waiting) and self._has_ended[self._first]:
            self._show()
            self._first += 1
        if self._first < len(self._waiting):
            self._show()

    def _show(self) -> None:
        text = self._waiting[self._first]
        # A terminal would obey what a model writes; a file or a program gets it as it is.
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text) if self._out.isatty() else text
        # A stdout that is not UTF-8 lacks letters that a model writes.
        encoding = self._out.encoding or "utf-8"
        self._out.write(text.encode(encoding, "backslashreplace").decode(encoding))
        self._out.flush()
        self._waiting[self._first] = ""


def _numbers(prompt: str, sequence: ServedSequence, tokenizer: Tokenizer) -> dict[str, Any]:
    stream = TextStream(tokenizer, prompt=sequence.request.prompt)
    return {
        "prompt": prompt,
        "completion": stream.add(*sequence.tokens) + stream.finish(),
        "token_ids": sequence.tokens,
        "finish_reason": sequence.finish_reason,
    }


def _describe(engine: Engine, spec: MeshSpec, seconds: float) -> str:
    sizes, mib = engine.sizes, 2**20
    return (
        f"mesh      {spec}, {sizes.slots} slots of {sizes.max_tokens} tokens in {sizes.groups} groups a data shard\n"
        f"device    {engine.param_bytes_per_device / mib:,.1f} MiB of weights, "
        f"{engine.cache_bytes_per_device / mib:,.1f} MiB of cache\n"
        f"ready     in {seconds:.1f} s"
    )


def _sum_up(engine: Engine, sequences: list[ServedSequence], seconds: float) -> str:
    num_tokens = sum(len(sequence.tokens) for sequence in sequences)
    return (
        f"{num_tokens} tokens in {seconds:.2f} s, {num_tokens / seconds:,.1f} tokens/s; "
        f"stages idle {engine.usage.idle_share:.0%} of the ticks"
    )
