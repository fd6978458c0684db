"""Compile constraints for the tokens of a model, with llguidance, and follow an answer token by token.

The library parses lazily: compiling takes milliseconds, and a set of allowed tokens some ten microseconds. All its work
is counted and bounded (`_LIMITS`), so no schema stalls it, and it runs without Python's lock.
"""

import importlib.util
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...hub.text_stream import ByteTokenizer, Tokenizer
from ...hub.tokenizer import ModelTokenizer
from ...meshes import ServeError, TrellaxError
from ..sampling.allowed import num_words
from .constraint import Constraint

MOST_GRAMMARS = 64
"""Number of compiled constraints that are kept, the latest used."""

_LIMITS = {"max_lexer_states": 100_000, "verbose_errors": False}
"""Bounds of llguidance besides its defaults: states take 1 to 2 kB, and verbose errors would print the schema."""

_END = "<|trellax end of answer|>"


class Matcher:
    """The state of one answer.

    Args:
        own: the `LLMatcher` of llguidance.
        end: the token that stands for the end of the answer; the model may not have it.
    """

    def __init__(self, own: Any, *, end: int) -> None:
        self._own, self._end = own, end

    def copy(self) -> "Matcher":
        """Return a matcher of the same state for another answer."""
        return Matcher(self._own.deep_copy(), end=self._end)

    def advance(self, token: int) -> None:
        """Go on to the state after a token."""
        self._own.consume_token(token)

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete as it is."""
        return self._own.is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete, and nothing may follow."""
        return self._own.is_stopped() and not self._own.is_error()

    def write_mask(self, row_W: np.ndarray, *, stop: Sequence[int]) -> bool:
        """Write the bits of the tokens that may come next, and return whether there are any.

        Args:
            row_W: uint32 [W], where token t is bit t % 32 of word t // 32.
            stop: tokens that end an answer: allowed where it may end, and nowhere else.

        Raises:
            ServeError: the library has given up.
        """
        bits = np.frombuffer(self._own.compute_bitmask(), np.uint32)
        if self._own.is_error():
            raise _given_up(self._own.get_error())
        row_W[:] = 0
        count = min(len(bits), len(row_W))
        row_W[:count] = bits[:count]
        for token in (self._end, *stop):
            if token // 32 < len(row_W):
                row_W[token // 32] &= ~np.uint32(1 << token % 32)
        if self.may_end:
            for token in stop:
                row_W[token // 32] |= np.uint32(1 << token % 32)
        return bool(row_W.any())


class Grammars:
    """The compiled constraints of an engine; for several threads.

    Args:
        tokenizer: that of the model.
        vocab_size: number of tokens of the model.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._compiled: OrderedDict[Constraint, Matcher] = OrderedDict()
        self._lock, self._opening = threading.Lock(), threading.Lock()

    def open(self) -> tuple[Any, int]:
        """Return the tokens of the model as llguidance has them, and the one that stands for the end of an answer.

        Raises:
            ServeError: the library is missing, or cannot read the tokenizer.
        """
        with self._opening:
            return self._opened

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return a matcher at the beginning of an answer; the first call for a constraint compiles it.

        Raises:
            ServeError: the constraint is broken or too large, or the library is missing or cannot read the tokenizer.
        """
        with self._lock:
            found = self._compiled.get(constraint)
            if found is not None:
                self._compiled.move_to_end(constraint)
                return found.copy()
        made = self._compile(constraint)
        with self._lock:
            self._compiled[constraint] = made
            while len(self._compiled) > MOST_GRAMMARS:
                self._compiled.popitem(last=False)
        return made.copy()

    def _compile(self, constraint: Constraint) -> Matcher:
        tokens, end = self.open()
        from llguidance import LLMatcher, LLParserLimits

        is_schema = constraint.kind == "json_schema"
        make = LLMatcher.grammar_from_json_schema if is_schema else LLMatcher.grammar_from_regex
        own = LLMatcher(tokens, make(constraint.text), log_level=0, limits=LLParserLimits(**_LIMITS))
        name = "JSON schema" if is_schema else "regular expression"
        if own.is_error():
            raise ServeError(f"the {name} is not supported: {_first_lines(own.get_error())}.", fix=_FIX)
        matcher = Matcher(own, end=end)
        # Also since the first of the masks is the slowest, and here nobody waits for it.
        if matcher.is_done or not matcher.write_mask(np.zeros(num_words(self._vocab_size), np.uint32), stop=()):
            raise ServeError(
                f"no token of this model can begin an answer that has the form of the {name}.",
                fix="allow answers that are not empty, in letters that the model writes.",
            )
        return matcher

    @cached_property
    def _opened(self) -> tuple[Any, int]:
        # The end of an answer is none of the model's tokens, which may have several of that kind or none.
        if importlib.util.find_spec("llguidance") is None:
            raise ServeError("constrained answers need llguidance.", fix="pip install 'trellax[constrain]'.")
        from llguidance import LLTokenizer, TokenizerWrapper

        try:
            if isinstance(self._tokenizer, ModelTokenizer):
                text, end = _with_end(self._tokenizer)
                return LLTokenizer(text, n_vocab=max(self._vocab_size, end + 1), eos_token=end), end
            tokens = _Tokens(self._tokenizer, vocab_size=self._vocab_size)
            return LLTokenizer(TokenizerWrapper(tokens), eos_token=tokens.eos_token_id), tokens.eos_token_id
        except ValueError as error:
            raise ServeError(
                f"the texts of this tokenizer's tokens are not known: {error}.", fix="leave the constraint out."
            ) from None


def _with_end(tokenizer: ModelTokenizer) -> tuple[str, int]:
    """Return a tokenizer.json with one more special token, and the id of that."""
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as HfTokenizer

    own = HfTokenizer.from_str(tokenizer.tokenizer.to_str())
    own.add_special_tokens([AddedToken(_END, special=True)])
    end = own.token_to_id(_END)
    if end is None or end < tokenizer.vocab_size:
        raise ValueError(f"it has ids that it does not count, below {tokenizer.vocab_size}")
    return own.to_str(), end


class _Tokens:
    """Tokens with a text each, as llguidance asks for them; one more is the end of an answer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [_bytes_of(tokenizer, token) for token in range(vocab_size)]
        self.eos_token_id = len(self.tokens)
        # 0xff begins no text in UTF-8: no constraint can ask for it.
        self.tokens.append(b"\xff" + _END.encode())
        self.special_token_ids = [self.eos_token_id]

    def __call__(self, content: bytes | str) -> list[int]:
        text = content.decode() if isinstance(content, bytes) else content
        ids = self._tokenizer.encode(text)
        if self._tokenizer.decode(ids) != text:
            raise ValueError(f"the tokenizer cannot write {text!r}")
        return ids


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    if isinstance(tokenizer, ByteTokenizer):
        return bytes([token]) if token < 256 else b""
    try:
        return tokenizer.decode([token]).encode()
    except (TrellaxError, IndexError, KeyError):  # the model has more tokens than the tokenizer
        return b""


_FIX = "see which keywords and signs docs/how-to/constrain.md lists."


def _first_lines(error: str) -> str:
    """Return an error of the library on one line, without what it prints of its state."""
    text = " ".join(error.partition("<")[0].split())
    return text[:300].rstrip(" .") or "no reason is given"


def _given_up(error: str) -> ServeError:
    # `_Tokens` has raised: what must follow has no tokens.
    if error.startswith("panic"):
        return ServeError(
            "no token of this model can write what the form of the answer asks for.",
            fix="allow letters that the model writes.",
        )
    return ServeError(
        f"the constraint of an answer took too much work: {_first_lines(error)}.",
        fix="give a simpler schema or expression.",
    )
