"""The tokens of a chat, and the mask of its answers, are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
from trellax.hub.chat.answers import DamagedChatError, render_answers
from trellax.hub.chat.template import ChatTemplate, load_chat_template
from trellax.hub.chat.tokens import encode_chats
from trellax.hub.tokenizer import load_tokenizer
from trellax.meshes import DataError

from .chats import CHATML, MARKED, REASONING, chat, write_tokenizer

CHATS = [
    chat("2 + 2?", "four", "and 3?", " fünf \U0001f600\n"),
    chat("Hé", "the sum", system="Be brief."),
    [*chat("call", "  trimmed  ")[:1], {"role": "assistant", "content": "{% a %} <|im_end|>"}],
]


def answers_of(source: str, messages: Any, **special: str) -> list[str]:
    rendered = render_answers(ChatTemplate(source, special={"bos_token": "", **special}), messages)
    return [rendered.text[start:end] for start, end in rendered.spans]


def test_answers_are_what_the_template_marks_or_what_they_add_to_their_prompts() -> None:
    assert answers_of(MARKED, CHATS[0]) == ["four<|im_end|>", " fünf \U0001f600\n<|im_end|>"]
    assert answers_of(CHATML, CHATS[0]) == ["four<|im_end|>\n", "fünf \U0001f600<|im_end|>\n"]
    assert answers_of(CHATML, CHATS[1]) == ["the sum<|im_end|>\n"]


@pytest.mark.parametrize("source", [MARKED, CHATML])
def test_decoded_tokens_of_the_mask_are_the_answers(source: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template=source))
    template = load_chat_template(tmp_path)
    assert template
    rendered = [render_answers(template, messages) for messages in CHATS]
    for tokens, own in zip(encode_chats(rendered, tokenizer), rendered, strict=True):
        found = tokenizer.tokenizer.decode(tokens.ids[tokens.mask == 1].tolist(), skip_special_tokens=False)
        assert found == "".join(own.text[start:end] for start, end in own.spans)
        assert tokenizer.tokenizer.decode(tokens.ids.tolist(), skip_special_tokens=False) == own.text


@pytest.mark.parametrize("source", [MARKED, CHATML])
def test_tokens_and_mask_are_those_of_transformers(source: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, template=source))
    tokenizer, template = load_tokenizer(tmp_path), load_chat_template(tmp_path)
    assert template
    for messages in CHATS:
        (ours,) = encode_chats([render_answers(template, messages)], tokenizer)
        known = {"return_dict": True, "return_assistant_tokens_mask": source == MARKED}
        wanted = theirs.apply_chat_template(messages, **known)
        assert ours.ids.tolist() == wanted["input_ids"]
        if source == MARKED:
            assert ours.mask.tolist() == wanted["assistant_masks"]


DAMAGED = {
    "null is no list of messages": None,
    "'text' is no list of messages": "text",
    r"\[\] is no list of messages": [],
    "message 1 has the role null, not one of": ["text"],
    "message 2 has the role 'king', not one of": [*chat("a"), {"role": "king", "content": "b"}],
    "message 1, of the role assistant, comes first: roles out of order": chat("a", "b")[1:],
    "message 2, of the role user, follows user: roles out of order": [*chat("a"), *chat("b", "c")],
    "message 3, of the role system, follows assistant": [*chat("a", "b"), {"role": "system", "content": "c"}],
    "message 2 has the content null, no text": [*chat("a"), {"role": "assistant", "content": None}],
    r"message 1 has the content \[\], no text": [{"role": "user", "content": []}, *chat("a", "b")[1:]],
    "there is no message of the assistant": chat("a"),
    "half of a surrogate pair": chat("a", "\ud800"),
    "the model's chat template does not take these messages: no b here": chat("a", "b"),
    "marks nothing that the assistant wrote": chat("a", "skip"),
}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_conversation_is_told_from_a_template_that_takes_none(message: str) -> None:
    refusing = "{% if m.content == 'b' %}{{ raise_exception('no b here') }}{% endif %}"
    marked = "{% if m.role == 'user' or m.content == 'skip' %}-{% else %}"
    marked += "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}"
    template = ChatTemplate("{% for m in messages %}" + refusing + marked + "{% endfor %}")
    with pytest.raises(DamagedChatError, match=message.replace("null", "None")):
        render_answers(template, DAMAGED[message])


def test_template_that_rewrites_answers_is_refused() -> None:
    with pytest.raises(DataError, match="writes message 2 in another way once more") as caught:
        answers_of(REASONING, chat("a", "b", "c", "d"))
    assert not isinstance(caught.value, DamagedChatError)
    assert "{% generation %}" in str(caught.value.fix)


def test_mark_whose_place_is_not_known_is_refused() -> None:
    source = "{% macro say(m) %}({% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    source += "{% for m in messages %}[{{ say(m) }}]{% endfor %}"
    with pytest.raises(DamagedChatError, match="inside of a macro"):
        answers_of(source, chat("a", "b"))


def test_calls_of_tools_need_no_text_and_nulls_of_a_table_are_left_out() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    messages = [*chat("2 + 2?"), call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    source = (
        "{% for m in messages %}{% if m.tool_calls is defined %}call{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    assert answers_of(source, [message | {"name": None} for message in messages]) == ["call;", "four;"]
    table = [{"tool_calls": None} | message for message in messages]
    assert answers_of(source, table) == ["call;", "four;"]
