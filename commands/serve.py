"""`trellax serve`: answer HTTP requests with a trained model, by the API of OpenAI."""

import argparse
import contextlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from ..hub.cached_folder import name_of
from ..hub.chat.template import load_chat_template
from ..hub.model_folder import ModelSource
from ..layers import ModelConfig
from ..meshes import MeshSpec, ServeError
from ..meshes.processes.messages import is_first
from ..serve import AsyncEngine, Engine
from ..serve.http.run import bind, run_server, url_of
from ..serve.http.service import Limits, Service
from ..serve.processes.channel import StepSender, receive_steps
from ..serve.processes.follow import follow, ignore_signals
from ..serve.state import MAX_STOPS
from ..train.processes.run_settings import collect_program_settings, sample_model
from .engine import (
    Guesser,
    apply_dtype,
    check_served,
    describe_engine,
    load_params,
    open_guesser,
    open_mesh,
    open_served,
)
from .processes import Joined, join_others

API_KEY = "TRELLAX_API_KEY"
"""Environment variable of the API key, which a command line would show to other users."""

_SLOTS, _MAX_TOKENS = 8, 4096

_SHARED_ARGUMENTS = (
    "mesh",
    "fake_devices",
    "slots",
    "max_tokens",
    "cache_tokens",
    "groups",
    "chunk",
    "dtype",
    "weights",
    "cache_dtype",
    "ema",
    "speculate_tokens",
    "silence",
)
"""Arguments that all processes of a server must share."""


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal, print the URL to stdout once requests are answered, and return the exit code.

    With several processes the first one has the clients, and the others work with it.

    Raises:
        TrellaxError: model, mesh, template or address do not fit; no weight is read then.
    """
    served: list[AsyncEngine] = []

    def tell_clients(why: str) -> None:
        for engine in served:
            engine.fail(why)

    facts = partial(collect_serve_settings, args)
    watched: dict[str, Any] = {"before_end": tell_clients, "parting": "start the server again"}
    with join_others(args, silence_s=args.silence, facts=facts, **watched) as joined:
        spec, source = open_served(args)
        source = replace(source, config=apply_dtype(source.config, args))
        sizes = _engine_sizes(args, source.config, spec, num_stops=len(source.end_ids))
        check_served(source.config, spec, sizes)
        guesser = open_guesser(args, source.config, spec, sizes)
        make_engine = partial(_make_engine, args, source, spec, sizes, guesser)
        if not is_first():
            # Process 0 ends the others when it has ended what its clients wait for.
            with ignore_signals():
                engine = make_engine()
                # Else the others would wait for this at the first request with a constraint.
                with contextlib.suppress(ServeError):
                    engine.constraints.open()
                follow(engine, receive_steps())
            return 0
        _serve_clients(args, source, make_engine, joined=joined, served=served)
    print("stopped", file=sys.stderr)
    return 0


def _serve_clients(
    args: argparse.Namespace,
    source: ModelSource,
    make_engine: Callable[[], Engine],
    *,
    joined: Joined,
    served: list[AsyncEngine],
) -> None:
    """Serve until a signal, on process 0; the engine is added to `served`."""
    template, key = load_chat_template(args.folder, file=args.chat_template), _read_key(args)
    with bind(args.host, args.port) as bound:
        engine = AsyncEngine(
            make_engine(),
            max_waiting=args.queue,
            others=StepSender() if joined.watch else None,
            on_failure=joined.watch.fail if joined.watch else None,
        )
        served.append(engine)
        service = Service(
            name=args.name or name_of(args.folder),
            engine=engine,
            source=source,
            template=template,
            api_key=key,
            limits=Limits(body_bytes=args.max_body_bytes, answer_s=args.timeout),
        )
        run_server(service, bound, on_ready=lambda: _print_ready(args, service, url_of(bound), joined.stdout))


def collect_serve_settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the settings that all processes of a server must share, by name."""
    own = {f"--{name.replace('_', '-')}": str(vars(args)[name]) for name in _SHARED_ARGUMENTS}
    drafts = args.speculate not in (None, "lookup")
    return {
        **own,
        **collect_program_settings(),
        "--speculate": "a draft model" if drafts else str(args.speculate),
        "llguidance": _version("llguidance"),
        "model": sample_model(args.folder),
        "draft model": sample_model(args.speculate) if drafts else "",
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _make_engine(
    args: argparse.Namespace, source: ModelSource, spec: MeshSpec, sizes: dict[str, Any], guesser: Guesser | None
) -> Engine:
    mesh, start_s = open_mesh(spec), time.perf_counter()
    params = load_params(source, spec, args, mesh=mesh)
    speculation = guesser.load(spec, mesh) if guesser else None
    own: dict[str, Any] = {"axes": spec.roles, "speculation": speculation, "tokenizer": source.tokenizer, **sizes}
    engine = Engine(source.config, params, mesh=mesh, **own)
    if is_first():
        print(describe_engine(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    return engine


def _print_ready(args: argparse.Namespace, service: Service, url: str, stdout: Any) -> None:
    if service.template is None:
        print("warning   the model has no chat template, so it only continues texts", file=sys.stderr)
    if service.api_key is None and args.host not in {"127.0.0.1", "localhost", "::1"}:
        print(f"warning   everyone who reaches {args.host} can use the server: set {API_KEY}", file=sys.stderr)
    ready = {"url": url, "api": f"{url}/v1", "model": service.name}
    print(
        json.dumps(ready) if args.json else f"{service.name} at {url}/v1, a page to chat at {url}",
        file=stdout,
        flush=True,
    )


def _read_key(args: argparse.Namespace) -> str | None:
    key = os.environ.get(API_KEY) if args.api_key is None else args.api_key
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ServeError("the API key is empty, or has letters that no header carries.", fix="use letters and digits.")
    return key


def _engine_sizes(args: argparse.Namespace, config: ModelConfig, spec: MeshSpec, *, num_stops: int) -> dict[str, Any]:
    groups = args.groups or spec.pipe
    parts = spec.data * groups
    return {
        "slots": args.slots or -(-_SLOTS // parts) * parts,
        "cache_tokens": args.cache_tokens or None,
        "max_tokens": args.max_tokens or min(_MAX_TOKENS, config.max_tokens),
        "groups": groups,
        "chunk": args.chunk,
        # A model may have more end tokens than an engine compares with by default.
        "max_stops": max(MAX_STOPS, num_stops),
        "cache_dtype": args.cache_dtype,
    }
