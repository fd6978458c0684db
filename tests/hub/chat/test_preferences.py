"""The ids of a prompt and its two answers are those that TRL makes, by the chat templates of transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
from trellax.hub.chat.answers import DamagedChatError
from trellax.hub.chat.preferences import encode_answers
from trellax.hub.chat.template import load_chat_template
from trellax.hub.tokenizer import load_tokenizer
from trellax.meshes import DataError

from .chats import CHATML, MARKED, REASONING, chat, write_tokenizer

THINKING = CHATML.replace("'<|im_start|>assistant\\n' }}{%- endif", "'<|im_start|>assistant\\n<think>\\n' }}{%- endif")
"""It begins an answer by what no answer of a record begins with, as that of DeepSeek-R1 does."""

REWRITING = CHATML.replace("message['content'] | trim", "(message['content'] if loop.last else 'left out')")


def encode(folder: Path, prompt: Any, *answers: str) -> list[tuple[list[int], list[int]]]:
    template, messages = load_chat_template(folder), [{"role": "assistant", "content": text} for text in answers]
    assert template
    return list(encode_answers(template, load_tokenizer(folder), prompt=prompt, answers=messages))


def random_chat(rng: random.Random) -> list[str]:
    """Return the texts of a prompt of one to three turns, and of two answers."""
    words = ["two", "sum?", " four", "é", "\U0001f600", "\n", "<think>", "and", "ss", ""]
    return ["".join(rng.choices(words, k=rng.randint(1, 6))) + "." for _ in range(rng.choice((3, 5, 7)))]


@pytest.mark.parametrize("source", [CHATML, MARKED, REASONING, THINKING])
def test_ids_are_those_of_trl(source: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, template=source))
    rng = random.Random(0)
    for _ in range(40):
        *before, chosen, rejected = random_chat(rng)
        prompt = chat(*before, system=rng.choice(("", "Be brief.")))
        # As DPOTrainer does: the completion begins where prompt and prompt with answer part, at one token for both.
        texts = [[*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
        start = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = [theirs.apply_chat_template(text, return_dict=True)["input_ids"] for text in texts]
        shared = min(
            next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), min(len(start), len(ids)))
            for ids in whole
        )
        assert encode(tmp_path, prompt, chosen, rejected) == [(ids[:shared], ids[shared:]) for ids in whole]


def test_answers_alone_are_left_of_the_prompt(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, template=CHATML))
    for (prompt, answer), text in zip(encode(tmp_path, chat("2 + 2?"), "four", "two"), ("four", "two"), strict=True):
        texts = [tokenizer.tokenizer.decode(ids, skip_special_tokens=False) for ids in (prompt, answer)]
        assert texts == ["<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n", f"{text}<|im_end|>\n"]


def test_prompt_that_an_answer_changes_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=REWRITING)
    with pytest.raises(DataError, match="writes the messages before an answer in another way"):
        encode(tmp_path, chat("2 + 2?"), "four", "two")


def test_damaged_answers_are_told_from_a_template_that_takes_none(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=CHATML)
    with pytest.raises(DamagedChatError, match="half of a surrogate pair"):
        encode(tmp_path, chat("2 + 2?"), "\ud800", "two")
    with pytest.raises(DamagedChatError, match="message 1, of the role assistant, comes first"):
        encode(tmp_path, [], "four", "two")
