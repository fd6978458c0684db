"""`trellax generate --chat`: a conversation in the terminal, or of messages from arguments or a pipe.

On a terminal messages are typed, and answers appear as they are decoded: `/quit` or Ctrl-D ends the conversation,
`/new` begins another one, Ctrl-C stops an answer. Text from a pipe is one message, which gets one answer.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ...hub.cached_folder import name_of
from ...hub.chat.template import TEMPLATE, ChatTemplate, load_chat_template
from ...meshes import MeshSpec, ServeError, TrellaxError
from ...serve import Engine
from ..engine import apply_dtype, check_served, describe_engine, load_params, open_guesser, open_mesh, open_served
from .answer_text import write_text
from .conversation import Answer, Conversation

_MAX_TOKENS = 4096
_MAX_MESSAGE_BYTES = 1 << 24
_QUIT, _NEW = "/quit", "/new"


def run_chat(args: argparse.Namespace, messages: list[str]) -> int:
    """Answer messages in turn, those of the arguments or typed ones, and return the exit code.

    Raises:
        TrellaxError: model, mesh and template do not fit each other; no weight is read then.
    """
    spec, source = open_served(args)
    source = replace(source, config=apply_dtype(source.config, args))
    sizes = _engine_sizes(args, spec, most=source.config.max_tokens)
    conversation = Conversation(args, source, _read_template(args), sizes["max_tokens"])
    sizes["max_stops"] = conversation.num_stops
    check_served(source.config, spec, sizes)
    is_typed = not messages and sys.stdin is not None and sys.stdin.isatty()
    messages = messages if messages or is_typed else [_read_pipe()]
    conversation.check(messages)
    guesser, mesh, start_s = open_guesser(args, source.config, spec, sizes), open_mesh(spec), time.perf_counter()
    engine = Engine(
        source.config,
        load_params(source, spec, args, mesh=mesh),
        mesh=mesh,
        axes=spec.roles,
        speculation=guesser.load(spec, mesh) if guesser else None,
        tokenizer=source.tokenizer,
        **sizes,
    )
    print(describe_engine(engine, spec, time.perf_counter() - start_s), file=sys.stderr)
    if is_typed:
        _talk(engine, conversation, is_json=args.json)
    for message in messages:
        _show(engine, conversation, message, is_json=args.json)
    return 0


def _read_template(args: argparse.Namespace) -> ChatTemplate:
    template = load_chat_template(args.folder, file=args.chat_template)
    if template is None:
        raise ServeError(
            f"the model {name_of(args.folder)} has no chat template, so messages are no prompt for it.",
            fix=f"give --chat-template FILE, put {TEMPLATE} into the folder, or leave --chat out.",
        )
    return template


def _engine_sizes(args: argparse.Namespace, spec: MeshSpec, *, most: int) -> dict[str, Any]:
    groups = args.groups or spec.pipe
    return {
        "slots": args.slots or spec.data * groups,
        "max_tokens": args.max_tokens or min(most, _MAX_TOKENS),
        "groups": groups,
        "chunk": args.chunk,
        "cache_dtype": args.cache_dtype,
    }


def _read_pipe() -> str:
    # One byte more than fits tells a longer text from one that fits exactly. A closed stdin is None.
    content = sys.stdin.buffer.read(_MAX_MESSAGE_BYTES + 1) if sys.stdin is not None else b""
    try:
        text = content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ServeError(f"the message on stdin is not UTF-8 text: {error}.", fix="convert it.") from None
    if len(content) > _MAX_MESSAGE_BYTES:
        raise ServeError(f"the message on stdin has more than {_MAX_MESSAGE_BYTES:,} bytes.", fix="send less.")
    if not text.strip():
        raise ServeError("there is no message on stdin.", fix='pipe a text in, or give --prompt "Hello".')
    return text


def _talk(engine: Engine, conversation: Conversation, *, is_json: bool) -> None:
    """Answer typed messages until `/quit` or the end of the input."""
    _edit_lines()
    print(f"a message ends with Enter; {_NEW} begins anew, {_QUIT} or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            message = input("> ")
        except UnicodeDecodeError:
            print("this is not UTF-8 text", file=sys.stderr)
            continue
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(f"\n{_QUIT} or Ctrl-D ends", file=sys.stderr)
            continue
        if message.strip() == _QUIT:
            return
        if message.strip() == _NEW:
            conversation.begin_anew()
        elif message.strip():
            try:
                _show(engine, conversation, message, is_json=is_json)
            except TrellaxError as error:
                # The conversation goes on without the message.
                print(error, file=sys.stderr)


def _edit_lines() -> None:
    """Let `input` edit lines and recall earlier ones, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


def _show(engine: Engine, conversation: Conversation, message: str, *, is_json: bool) -> None:
    """Print the answer to a message, piece by piece or as a line of JSON."""
    start_s, answer = time.perf_counter(), conversation.begin(engine, message)
    with _interrupts_stop(answer):
        for piece in answer.pieces():
            if not is_json:
                write_text(sys.stdout, piece)
    conversation.keep(answer)
    write_text(sys.stdout, json.dumps(answer.numbers()) + "\n" if is_json else "\n")
    seconds, count = time.perf_counter() - start_s, len(answer.sequence.tokens)
    stopped = ", stopped" if answer.sequence.finish_reason == "cancelled" and not answer.text.has_stopped else ""
    print(f"{count} tokens in {seconds:.2f} s, {count / seconds:,.1f} tokens/s{stopped}", file=sys.stderr)


@contextmanager
def _interrupts_stop(answer: Answer) -> Iterator[None]:
    """Let Ctrl-C stop the answer between two steps of the engine; a second one ends the command.

    An exception in the middle of a step would leave the engine without its state, which the step was given.
    """

    def stop(*_: Any) -> None:
        if answer.is_stopping:
            raise KeyboardInterrupt
        answer.is_stopping = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
