"""Render a model's chat template, the Jinja text that turns messages into one text.

A template comes with a model, so it is somebody else's program. It runs in Jinja's sandbox without a loader, as
transformers runs it: it reaches no files, no modules and no attributes of Python. Memory and time are bounded too, see
`sandbox.py`. Read `answers.py` next for what of the text the assistant wrote.
"""

import sys
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jinja2
from jinja2.ext import Extension

from ...meshes import ServeError, TrellaxError
from ..cached_folder import find_model_folder
from ..folder import find_file, read_file, read_json
from . import budget
from .budget import TooMuchError
from .sandbox import Sandbox

TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"

MAX_TEMPLATE_BYTES = 1 << 20
"""Length of the longest template; real ones have up to 20 kB."""

MAX_PROMPT_LETTERS = 16 << 20
MAX_SECONDS = 2.0

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """The text of messages, and the spans [start, end) of its letters that the assistant wrote, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTemplate:
    """A compiled chat template.

    >>> ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render([{"role": "user", "content": "hi"}])
    'hi'

    Args:
        source: the text of the template.
        special: texts of special tokens by the names that templates use, such as "bos_token".

    Raises:
        ServeError: the template is too long, or Jinja cannot compile it.
    """

    def __init__(self, source: str, *, special: dict[str, str] | None = None, max_seconds: float = MAX_SECONDS) -> None:
        self.source, self._special, self._max_seconds = source, special or {}, max_seconds
        if len(source) > MAX_TEMPLATE_BYTES:
            raise _broken(f"it has {len(source)} letters, and {MAX_TEMPLATE_BYTES} are read")
        try:
            self._environment = _Environment()
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
            raise _broken(str(error) or type(error).__name__) from None

    @property
    def marks_answers(self) -> bool:
        """Whether the template says what the assistant wrote, by `{% generation %}`."""
        return self._environment.has_marks

    def render(self, messages: Sequence[dict[str, Any]], *, ends: Literal["prompt", "message"] = "prompt") -> str:
        """Return the prompt for the next message of the assistant, or the text of the messages alone.

        Raises:
            ServeError: the template refuses the messages, fails, or takes too long.
        """
        return self._render(messages, ends=ends).text

    def render_marked(self, messages: Sequence[dict[str, Any]]) -> RenderedChat:
        """Return the text of the messages, with the spans that the template marks by `{% generation %}`.

        Raises:
            ServeError: as `render`; or a mark is where its place in the text is not known.
        """
        return self._render(messages, ends="message")

    def _render(self, messages: Sequence[dict[str, Any]], *, ends: Literal["prompt", "message"]) -> RenderedChat:
        limit = _TimeLimit(time.monotonic() + self._max_seconds, name=self._template.filename or "<template>")
        given = {"messages": list(messages), "add_generation_prompt": ends == "prompt", **self._special}
        before, parts, marks = sys.gettrace(), [], _Marks()
        token, left = _marks.set(marks), budget.begin(budget.Budget())
        sys.settrace(limit.trace)
        try:
            for part in self._template.generate(**given):
                marks.num_letters += len(part)
                if marks.num_letters > MAX_PROMPT_LETTERS:
                    raise TooMuchError(f"it writes more than {MAX_PROMPT_LETTERS} letters")
                parts.append(part)
            return marks.apply_to("".join(parts))
        except Exception as error:
            # A template may raise anything that Python's operators raise.
            why = str(error) or type(error).__name__
            raise ServeError(
                f"the model's chat template does not take these messages: {why}.",
                fix="send the roles in the order that the model was trained with.",
            ) from None
        finally:
            sys.settrace(before)
            _marks.reset(token)
            budget.end(left)


@dataclass
class _Marks:
    """The letters that a template has written so far, and where it marked what the assistant wrote."""

    num_letters: int = 0
    found: list[tuple[int, str]] = field(default_factory=list)

    def apply_to(self, text: str) -> RenderedChat:
        # A macro writes into a buffer of its own, whose place in the text is not known when the mark is met.
        if not all(text.startswith(own, start) for start, own in self.found):
            raise TooMuchError("its {% generation %} is inside of a macro or another block")
        return RenderedChat(text=text, spans=tuple((start, start + len(own)) for start, own in self.found if own))


_marks: ContextVar[_Marks | None] = ContextVar("marks", default=None)


class _TimeLimit:
    """A trace function that ends a template after its time: at any line of it, so that a loop ends too."""

    def __init__(self, end_s: float, *, name: str) -> None:
        self._end_s, self._name = end_s, name

    def trace(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        """Trace the lines of the template alone; other functions run at full speed."""
        return self._trace_line if frame.f_code.co_filename == self._name else None

    def _trace_line(self, _frame: FrameType, _event: str, _arg: Any) -> Any:
        if time.monotonic() > self._end_s:
            raise TooMuchError("it takes too long")
        return self._trace_line


class _Environment(Sandbox):
    """The sandbox, with what templates of chats have besides."""

    has_marks = False
    """Whether a template has `{% generation %}`."""

    def __init__(self) -> None:
        super().__init__(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what to train on; it changes no text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Return a block that tells where its text begins and ends, as that of transformers does."""
        line = next(parser.stream).lineno
        assert isinstance(self.environment, _Environment)
        self.environment.has_marks = True
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, marks = caller(), _marks.get()
        if marks is not None:
            marks.found.append((marks.num_letters, text))
        return text


def _broken(why: str) -> ServeError:
    return ServeError(f"the chat template is broken: {why}.", fix="give another one by --chat-template FILE.")


def load_chat_template(folder: str | Path, *, file: str | None = None) -> ChatTemplate | None:
    """Return the chat template of a model folder, or of a file in its place; None if there is none.

    Raises:
        ServeError: the template or the folder's tokenizer_config.json is broken.
    """
    folder = find_model_folder(folder)
    config = read_json(folder, TOKENIZER_CONFIG, error=ServeError)
    config = config if isinstance(config, dict) else {}
    source = _read_template(Path(file)) if file else _find_source(folder, config)
    return None if source is None else ChatTemplate(source, special=_special_tokens(config))


def _find_source(folder: Path, config: dict[str, Any]) -> str | None:
    if find_file(folder, TEMPLATE, error=ServeError):
        return _read_template(folder / TEMPLATE)
    own = config.get("chat_template")
    if isinstance(own, list):  # several by name, such as one for tools
        named = {one.get("name"): one.get("template") for one in own if isinstance(one, dict)}
        own = named.get("default")
    return own if isinstance(own, str) else None


def _read_template(file: Path) -> str:
    try:
        content = read_file(file.parent, file.name, max_bytes=MAX_TEMPLATE_BYTES, error=ServeError)
        if content is None:
            raise ServeError(f"{file} is no chat template: there is no such file.", fix="check the path.")
        return content.decode("utf-8")
    except TrellaxError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"{file} cannot be read: {error}.", fix="name a text file.") from None


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the texts of special tokens, which tokenizer_config.json has as texts or as objects."""
    found = {}
    for name in _SPECIAL:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found
