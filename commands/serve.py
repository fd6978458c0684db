"""`trellax serve`: answer HTTP requests with a trained model, by the API of OpenAI."""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..hub.model_folder import ModelSource
from ..layers import ModelConfig
from ..meshes import MeshSpec, ServeError
from ..serve import AsyncEngine, Engine
from ..serve.http.chat_template import load_chat_template
from ..serve.http.run import bind, run_server, url_of
from ..serve.http.service import Limits, Service
from ..serve.state import MAX_STOPS
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

API_KEY = "TRELLAX_API_KEY"
"""Environment variable of the API key, which a command line would show to other users."""

_SLOTS, _MAX_TOKENS = 8, 4096


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal, print the URL to stdout once requests are answered, and return the exit code.

    Raises:
        TrellaxError: model, mesh, template or address do not fit; no weight is read then.
    """
    spec, source = open_served(args)
    source = replace(source, config=apply_dtype(source.config, args))
    sizes = _engine_sizes(args, source.config, spec, num_stops=len(source.end_ids))
    check_served(source.config, spec, sizes)
    guesser = open_guesser(args, source.config, spec, sizes)
    template, key = load_chat_template(args.folder, file=args.chat_template), _read_key(args)
    with bind(args.host, args.port) as bound:
        service = Service(
            name=args.name or Path(args.folder).resolve().name,
            engine=AsyncEngine(_make_engine(args, source, spec, sizes, guesser), max_waiting=args.queue),
            source=source,
            template=template,
            api_key=key,
            limits=Limits(body_bytes=args.max_body_bytes, answer_s=args.timeout),
        )
        run_server(service, bound, on_ready=lambda: _print_ready(args, service, url_of(bound)))
    print("stopped", file=sys.stderr)
    return 0


def _make_engine(
    args: argparse.Namespace, source: ModelSource, spec: MeshSpec, sizes: dict[str, Any], guesser: Guesser | None
) -> Engine:
    mesh, start_s = open_mesh(spec), time.perf_counter()
    params = load_params(source, spec, args, mesh=mesh)
    speculation = guesser.load(spec, mesh) if guesser else None
    engine = Engine(source.config, params, mesh=mesh, axes=spec.roles, speculation=speculation, **sizes)
    print(describe_engine(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    return engine


def _print_ready(args: argparse.Namespace, service: Service, url: str) -> None:
    if service.template is None:
        print("warning   the model has no chat template, so it only continues texts", file=sys.stderr)
    if service.api_key is None and args.host not in {"127.0.0.1", "localhost", "::1"}:
        print(f"warning   everyone who reaches {args.host} can use the server: set {API_KEY}", file=sys.stderr)
    ready = {"url": url, "api": f"{url}/v1", "model": service.name}
    print(json.dumps(ready) if args.json else f"{service.name} at {url}/v1, a page to chat at {url}", flush=True)


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
