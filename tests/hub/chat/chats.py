"""Chat templates and a tokenizer for tests."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Of Qwen's kind; it marks no answers."""

MARKED = """{{- bos_token }}{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}{{- message['content'] + '<|im_end|>' }}{%- endif %}{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""The same, with its answers marked."""

REASONING = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if loop.last and message['role'] == 'assistant' %}{{- '<think>\\n\\n</think>' }}{%- endif %}
    {{- message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""It writes an answer in another way once more messages follow, as Qwen 3's does."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def chat(*words: str, system: str = "") -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": own} for i, own in enumerate(words)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def write_tokenizer(folder: Path, *, template: str | None, **config: Any) -> Path:
    """Write a byte-level BPE with the special tokens of ChatML, and a chat template beside it."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["what is the sum of two and two, user and assistant? four!"] * 9, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[2]} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
