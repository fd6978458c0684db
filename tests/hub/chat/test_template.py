"""Chat templates: as transformers renders them, from all places of a model folder, and shut in."""

import json
from pathlib import Path
from typing import Any

import pytest
from trellax.hub.chat.template import ChatTemplate, load_chat_template
from trellax.meshes import ServeError

MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hé <b>"}]

CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}{{- raise_exception('system first') }}{%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Of Qwen's kind."""

TAGGED = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{% generation %}[{{ m | tojson }}]{% endgeneration %}
{% endfor %}"""


def test_template_of_the_usual_kind() -> None:
    wanted = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHé <b><|im_end|>\n<|im_start|>assistant\n"
    assert ChatTemplate(CHATML).render(MESSAGES) == wanted


def test_template_with_the_tags_and_filters_of_transformers() -> None:
    text = ChatTemplate(TAGGED, special={"bos_token": "<s>"}).render(MESSAGES)
    assert text == '<s>[{"role": "user", "content": "Hé <b>"}]'


@pytest.mark.parametrize(
    "source", [CHATML, TAGGED, "{{ messages | length }} {{ 'a' * 3 }} {{ 7 % 2 }} {{ 'x\ny' | indent(2) }}"]
)
def test_template_renders_as_transformers_renders_it(source: str) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    wanted, _ = chat_template_utils.render_jinja_template(
        [MESSAGES], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert ChatTemplate(source, special={"bos_token": "<s>"}).render(MESSAGES) == wanted[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include 'tests/conftest.py' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ 'a' * 999999999 }}",
        "{{ 9 ** 99999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{% for _ in range(99999) %}{% for _ in range(99999) %}{{ 'abc' }}{% endfor %}{% endfor %}",
        "{% for _ in range(99999) %}{% for _ in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_template_reaches_nothing_and_ends(source: str) -> None:
    with pytest.raises(ServeError, match="the model's chat template does not take these messages"):
        ChatTemplate(source, max_seconds=0.2).render(MESSAGES)


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{ messages", "{% nothing %}", "a" * (1 << 21), "{{ 'a' | nofilter }}"]
)
def test_template_that_does_not_compile_is_an_error_at_the_start(source: str) -> None:
    with pytest.raises(ServeError, match="the chat template is broken"):
        ChatTemplate(source)


def render(folder: Path, **files: Any) -> str | None:
    for name, content in files.items():
        path = folder / {"template": "chat_template.jinja", "config": "tokenizer_config.json", "own": "own.jinja"}[name]
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    template = load_chat_template(folder, file=str(folder / "own.jinja") if "own" in files else None)
    return None if template is None else template.render(MESSAGES)


def test_template_is_found_in_all_places(tmp_path: Path) -> None:
    assert render(tmp_path) is None
    assert render(tmp_path, config={"chat_template": None}) is None
    assert render(tmp_path, config={"chat_template": "{{ eos_token }}", "eos_token": {"content": "</s>"}}) == "</s>"
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert render(tmp_path, config={"chat_template": several}) == "d"
    assert render(tmp_path, template="file") == "file"
    assert render(tmp_path, own="own") == "own"


@pytest.mark.parametrize("files", [{"config": "{"}, {"template": "{% if %}"}])
def test_broken_files_are_errors(tmp_path: Path, files: dict[str, Any]) -> None:
    with pytest.raises(ServeError):
        render(tmp_path, **files)


def test_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="there is no such file"):
        load_chat_template(tmp_path, file=str(tmp_path / "no.jinja"))
