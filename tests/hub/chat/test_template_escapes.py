"""Known ways out of Jinja's sandbox: a template reads no file, runs no code, and sees nothing but messages and text."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from trellax.hub.chat.template import ChatTemplate
from trellax.meshes import ServeError

MESSAGES = [{"role": "user", "content": "Hi"}]
# Not compile and exec: Jinja compiles a line of its own to raise an error at the template's line.
FORBIDDEN = {"open", "import", "os.system", "os.listdir", "os.exec", "subprocess.Popen", "socket.connect"}
FOUND = ("<class", "<module", "<code", "<built-in", "<frame", "root:", "'type'")

ESCAPES = {
    "globals_of_a_function": "{{ raise_exception.__globals__ }}",
    "globals_by_item": "{{ raise_exception['__globals__'] }}",
    "globals_by_attr": "{{ raise_exception | attr('__globals__') }}",
    "code_of_a_function": "{{ strftime_now.__self__ }}{{ raise_exception.__code__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__() }}",
    "subclasses_by_attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "class_by_parts_of_a_name": "{{ ''|attr('__cla' ~ 'ss__') }}",
    "class_by_hex_letters": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "class_by_map": "{{ ['']|map(attribute='__class__')|list }}",
    "class_by_select": "{{ ['']|selectattr('__class__')|map(attribute='__class__')|list }}",
    "class_by_groupby": "{{ ['']|groupby('__class__') }}",
    "class_by_sort": "{{ ['', 'a']|sort(attribute='__class__')|map('attr', '__class__')|list }}",
    "class_by_format": "{{ '{0.__class__}'.format('') }}",
    "class_by_format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "format_kept_in_a_name": "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    # CVE-2024-56326 and CVE-2025-27516.
    "format_by_attr": "{{ ('{0.__class__}'|attr('format'))('') }}",
    "format_by_map": "{{ (['{0.__class__}']|map('attr', 'format')|first)('') }}",
    "format_by_reject": "{{ ['{0.__class__.__init__.__globals__}'.format]|map('string')|list }}",
    # CVE-2019-10906 and CVE-2016-10745.
    "str_of_format_map": "{{ '{a.__class__.__mro__}'.format_map(a='') }}{{ ''.format_map.__self__.__class__ }}",
    "context_of_self": "{{ self._TemplateReference__context }}",
    "environment_of_self": "{{ self.__init__.__globals__.sys.modules }}",
    "globals_of_namespace": "{{ namespace.__init__.__globals__ }}",
    "globals_of_range": "{{ range.__class__.__mro__ }}{{ dict.mro() }}",
    "globals_of_a_macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "caller": "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "loop": "{% for a in messages %}{{ loop.__init__.__globals__ }}{{ loop._recurse.__globals__ }}{% endfor %}",
    "generator": "{{ (messages|map('upper')).gi_frame.f_builtins }}",
    "undefined": "{{ nothing.__init__.__globals__ }}",
    "undefined_class": "{{ nothing.__class__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'] }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "request": "{{ request.application.__globals__.__builtins__ }}",
    "builtins": "{{ __builtins__ }}{{ __import__('os') }}{{ open('/etc/passwd').read() }}",
    "eval": "{{ eval('1') }}{{ exec('1') }}{{ getattr('', 'x') }}",
    "include": "{% include '/etc/passwd' %}",
    "include_ignored": "{% include '/etc/passwd' ignore missing %}",
    "import_": "{% from 'os' import system %}{{ system('id') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "mutation": "{% set x = messages[0].update({'role': 'king'}) %}",
    "debug": "{% debug %}",
}


_seen: list[str] | None = None


def _hear(event: str, _: Any) -> None:
    if _seen is not None and event in FORBIDDEN:
        _seen.append(event)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Record what Python does that a template must not; a hook stays for ever, so it is told when to listen."""
    global _seen  # noqa: PLW0603
    _seen = []
    try:
        yield _seen
    finally:
        _seen = None


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    render("{{ 1 / 0 }}")  # Jinja imports what it raises errors with
    sys.addaudithook(_hear)


def render(source: str) -> str:
    """Return what a template writes; nothing where it is refused."""
    try:
        return ChatTemplate(source).render(MESSAGES)
    except ServeError:
        return ""


@pytest.mark.parametrize("source", ESCAPES.values(), ids=ESCAPES)
def test_an_escape_is_refused_or_finds_nothing(source: str) -> None:
    with watched() as seen:
        text = render(source)
    assert seen == []
    assert [one for one in FOUND if one in text] == []
    assert MESSAGES == [{"role": "user", "content": "Hi"}]


def test_what_is_watched_is_heard(tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    with watched() as seen:
        (tmp_path / "file").open().close()
    assert seen == ["open"]


@pytest.mark.parametrize(
    "content", ["{{ 7 * 7 }}", "{% include '/etc/passwd' %}", "{{ ''.__class__ }}", "{# a #}", "{% raw %}"]
)
def test_what_users_write_is_text_and_no_template(content: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% endfor %}")
    assert template.render([{"role": "user", "content": content}]) == f"user: {content}"
