"""What may come next, token by token; and forms that do not compile are refused with a sentence."""

import re
import time
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from trellax.hub.special_ids import SpecialIds
from trellax.hub.text_stream import ByteTokenizer
from trellax.hub.tokenizer import ModelTokenizer
from trellax.meshes import ServeError
from trellax.serve import Constraint
from trellax.serve.constraints.grammars import MOST_GRAMMARS, Grammars, Matcher

pytest.importorskip("llguidance", reason="needs the extra constrain")

BYTES = Grammars(ByteTokenizer(), vocab_size=256)


def allowed(matcher: Matcher, *, vocab_size: int = 256, stop: tuple[int, ...] = ()) -> set[int]:
    row_W = np.full(-(-vocab_size // 32), 7, np.uint32)
    has_any = matcher.write_mask(row_W, stop=stop)
    found = {token for token in range(vocab_size) if row_W[token // 32] >> (token % 32) & 1}
    assert has_any == bool(found)
    return found


def test_a_regex_is_followed_byte_by_byte() -> None:
    matcher = BYTES.matcher(Constraint.regex("[ab]c|dé"))
    assert allowed(matcher) == set(b"abd")
    matcher.advance(ord("d"))
    assert allowed(matcher) == {"é".encode()[0]}
    matcher.advance("é".encode()[0])
    assert not matcher.is_done
    matcher.advance("é".encode()[1])
    assert matcher.is_done


def test_a_stop_token_may_come_where_the_answer_may_end_and_nowhere_else() -> None:
    matcher = BYTES.matcher(Constraint.regex("a[b;]*"))
    assert allowed(matcher, stop=(0, ord("a"))) == set()
    matcher.advance(ord("a"))
    assert matcher.may_end
    assert allowed(matcher, stop=(0,)) == {0, *b"b;"}
    assert allowed(matcher) == set(b"b;")


def test_matchers_of_one_form_are_apart() -> None:
    one, other = (BYTES.matcher(Constraint.regex("ab")) for _ in range(2))
    one.advance(ord("a"))
    assert (allowed(one), allowed(other)) == (set(b"b"), set(b"a"))


def test_the_tokens_of_a_model_have_several_letters_and_ends_that_are_no_text() -> None:
    own = Tokenizer(models.BPE(vocab={"<s>": 0, "t": 1, "r": 2, "tr": 3, "u": 4, "e": 5, "ue": 6, "Ġ": 7}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens([AddedToken("<s>", special=True)])
    special = SpecialIds(end_id=None, stop_ids=(), begin_id=None, warnings=())
    tokenizer: Any = ModelTokenizer(tokenizer=own, file=None, vocab_size=8, special=special)  # type: ignore[arg-type]
    # The model has more tokens than its tokenizer.
    matcher = Grammars(tokenizer, vocab_size=40).matcher(Constraint.regex("(tr)?[ue]+"))
    assert allowed(matcher, vocab_size=40, stop=(0,)) == {1, 3, 4, 5, 6}
    matcher.advance(3)
    assert allowed(matcher, vocab_size=40, stop=(0,)) == {4, 5, 6}
    matcher.advance(6)
    assert allowed(matcher, vocab_size=40, stop=(0,)) == {0, 4, 5, 6}


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        (Constraint.regex("a("), "the regular expression is not supported: .* unclosed group"),
        (Constraint.regex("(?=a)b"), "look-around"),
        (Constraint.json_schema({"type": "wrong"}), "the JSON schema is not supported: Invalid type: wrong"),
        (Constraint.json_schema({"not": {}}), 'Unimplemented keys: ."not"'),
        (Constraint.json_schema({"$ref": "http://127.0.0.1/x"}), "not present in a registry"),
        (Constraint.json_schema(False), "Unsatisfiable"),
        (Constraint.json_schema({"$ref": "#"}), "NoExtension|no token"),
        (Constraint.regex("(a{0})"), "no token of this model can begin"),
    ],
)
def test_what_does_not_compile_is_refused(constraint: Constraint, told: str) -> None:
    with pytest.raises(ServeError, match=told) as error:
        BYTES.matcher(constraint)
    assert "\n" not in error.value.problem
    assert len(error.value.problem) < 500


def test_a_model_without_the_letters_is_told() -> None:
    class Letters:
        def encode(self, text: str) -> list[int]:
            return ["ab".index(letter) for letter in text]

        encode_prompt = encode

        def decode(self, ids: Any) -> str:
            return "".join("ab"[one] for one in ids)

    grammars = Grammars(Letters(), vocab_size=3)
    assert allowed(grammars.matcher(Constraint.regex("[abc]+")), vocab_size=3) == {0, 1}
    for constraint in (Constraint.json_object(), Constraint.regex("c")):
        with pytest.raises(ServeError, match="no token of this model"):
            grammars.matcher(constraint)


def test_the_latest_forms_are_kept() -> None:
    grammars = Grammars(ByteTokenizer(), vocab_size=256)
    for number in range(MOST_GRAMMARS + 5):
        grammars.matcher(Constraint.regex(f"a{{{number + 1}}}"))
        grammars.matcher(Constraint.regex("a{1}"))
    assert len(grammars._compiled) == MOST_GRAMMARS
    assert Constraint.regex("a{1}") in grammars._compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    "constraint",
    [
        Constraint.json_schema({"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(3500)}}),
        Constraint.json_schema({"enum": [f"{i * 7919 % 99991:06}" for i in range(12_000)]}),
        Constraint.json_schema(
            {"anyOf": [{"type": "string", "pattern": f"(.*{i}.*){{3}}.{{50}}"} for i in range(1800)]}
        ),
        Constraint.regex("(.*a){30}.{500}"),
        Constraint.regex(r"[\p{L}\p{N}]{1,500}" * 100),
        Constraint.regex("(.*(a|b).{12}){3}"),
    ],
    ids=lambda constraint: re.sub(r"\W+", "", constraint.text)[:20],
)
def test_hard_forms_take_bounded_time_or_are_refused(constraint: Constraint) -> None:
    start_s, slowest_s, error = time.perf_counter(), 0.0, ""
    try:
        matcher = Grammars(ByteTokenizer(), vocab_size=256).matcher(constraint)
        assert time.perf_counter() - start_s < 20
        for _ in range(200):
            start_s = time.perf_counter()
            tokens = allowed(matcher)
            slowest_s = max(slowest_s, time.perf_counter() - start_s)
            if not tokens:
                break
            matcher.advance(min(tokens, key=lambda token: abs(token - ord("a"))))
    except ServeError as found:
        error = found.problem
    assert not error or "took too much work" in error or "not supported" in error
    # Measured 0.03 s alone on this library's bounds; the machine may be busy.
    assert slowest_s < 2
