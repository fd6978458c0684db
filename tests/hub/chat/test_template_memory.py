"""A template that means harm fills no memory and comes to an end: what it makes is bounded before it is made."""

import time
import tracemalloc
from collections.abc import Iterator

import pytest
from trellax.hub.chat.budget import MAX_BYTES
from trellax.hub.chat.template import ChatTemplate
from trellax.meshes import ServeError

MESSAGES = [{"role": "user", "content": "Hi\tyou\n" * 3}]
BIG = "{% set big = 'a' * 999999 %}"
GROW = "{%% set ns = namespace(x=%s) %%}{%% for _ in range(99999) %%}%s{%% endfor %%}"
LOOPS = "{%% set ns = namespace(x=%s) %%}{%% for _ in range(9999) %%}{%% for _ in range(9999) %%}%s"
LOOPS += "{%% endfor %%}{%% endfor %%}"
NESTED = "{%% set ns = namespace(x=[1], y=[1]) %%}{%% for _ in range(40) %%}{%% set ns.x = [ns.x, ns.x] %%}"
NESTED += "{%% set ns.y = [ns.y, ns.y] %%}{%% endfor %%}%s"

BOMBS = {
    "doubled_by_plus": GROW % ("'ab'", "{% set ns.x = ns.x + ns.x %}"),
    "doubled_by_tilde": GROW % ("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled_lists": GROW % ("[1]", "{% set ns.x = ns.x + ns.x %}"),
    "doubled_by_a_block": GROW % ("'ab'", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "doubled_by_a_macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + GROW % ("'ab'", "{% set ns.x = m(ns.x) %}"),
    "doubled_by_a_filter_block": GROW
    % ("'ab'", "{% set x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}{% set ns.x = x %}"),
    "doubled_by_join": GROW % ("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "doubled_by_replace": GROW % ("'ab'", "{% set ns.x = ns.x.replace('a', 'aa') %}"),
    "doubled_by_format": GROW % ("'ab'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "data_in_a_block": "{% set x %}{% for _ in range(99999) %}" + "b" * 9999 + "{% endfor %}{% endset %}",
    "slices_that_are_kept": BIG + LOOPS % ("[]", "{% set ns.x = [ns.x, big[1:]] %}"),
    "copies_that_are_kept": BIG + LOOPS % ("[]", "{% set ns.x = [ns.x, big.upper(), big | lower] %}"),
    "dicts_that_are_kept": "{% set d = {}.fromkeys(range(99999)) %}"
    + LOOPS % ("[]", "{% set ns.x = [ns.x, dict(d)] %}"),
    "lists_that_are_kept": LOOPS % ("[]", "{% set ns.x = [ns.x, [" + "1, " * 999 + "]] %}"),
    "objects_that_are_kept": LOOPS % ("[]", "{% set ns.x = namespace(a=ns.x, b=_) %}"),
    "replace": BIG + "{{ big.replace('a', big) }}",
    "replace_filter": BIG + "{{ big | replace('a', big) }}",
    "replace_by_map": BIG + "{{ [big] | map('replace', 'a', big) | list }}",
    "replace_of_nothing": BIG + "{{ big | replace('', big) }}",
    "join": BIG + "{{ big.join(big) }}",
    "join_filter": BIG + "{{ range(99999) | join(big) }}",
    "join_of_an_iterator": BIG + "{{ big.join(range(99999) | map('string')) }}",
    "letters": "{% set big = 'ж' * 9999999 %}{{ big | list }}{{ big | select | list }}",
    "letters_by_an_iterator": "{% set big = 'ж' * 9999999 %}{% set x = big | select | list %}",
    "letters_by_split": "{% set big = 'ж ' * 4999999 %}{% set x = big.split() %}",
    "words": "{% set big = 'ж ' * 4999999 %}{{ big | wordcount }}",
    "tabs": "{% set big = '\\t' * 999999 %}{{ big.expandtabs(9999) }}",
    "indent": "{% set big = '\\n' * 9999999 %}{{ big | indent(64, true, true) }}",
    "wide_format": "{{ '{:999999999}'.format(1) }}",
    "wide_format_by_value": "{{ '{:{}}'.format(1, 999999999) }}",
    "wide_batch": "{{ [1] | batch(99999999, 1) | list }}",
    "bytes": "{{ (1).to_bytes(16000000) }}",
    "table": BIG + "{{ big.translate({97: big}) }}",
    "nested_text": NESTED % "{{ ns.x }}",
    "nested_namespace": NESTED % "{{ ns }}",
    "nested_concat": NESTED % "{{ 'a' ~ ns.x }}",
    "nested_json": NESTED % "{{ ns.x | tojson }}",
    "nested_comparison": NESTED % "{{ ns.x == ns.y }}",
    "nested_order": NESTED % "{{ [ns.x, ns.y] | sort }}",
    "nested_test": NESTED % "{{ [ns.x] | select('equalto', ns.y) | list }}",
    "nested_index": NESTED % "{{ [ns.x].index(ns.y) }}",
    "nested_views": NESTED % "{{ {'a': ns.x}.items() }}",
    "sum_of_lists": "{% set l = [range(9999) | list] * 9999 %}{{ l | sum(start=[]) | length }}",
    "time": "{{ strftime_now('%9999c' * 9999) }}",
}


@pytest.fixture
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("_traced")
@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_what_a_template_makes_is_bounded(source: str) -> None:
    start_s = time.process_time()
    with pytest.raises(ServeError, match="the model's chat template does not take these messages"):
        ChatTemplate(source, max_seconds=20).render(MESSAGES)
    # What is measured slows it down: the bound is that of memory.
    assert tracemalloc.get_traced_memory()[1] < 1.5 * MAX_BYTES
    assert time.process_time() - start_s < 60


QUICK = [
    "doubled_by_tilde",
    "doubled_by_a_block",
    "replace_by_map",
    "join_of_an_iterator",
    "wide_format",
    "nested_text",
]
QUICK += ["nested_comparison", "nested_test", "indent", "table"]


@pytest.mark.parametrize("name", QUICK)
def test_a_bomb_is_told(name: str) -> None:
    with pytest.raises(ServeError, match=r"makes more than|reads lists|is too large|it calls"):
        ChatTemplate(BOMBS[name], max_seconds=60).render(MESSAGES)


def test_long_chats_and_what_templates_do_with_them_have_room() -> None:
    source = """{% set ns = namespace(text='') %}
{%- for m in messages %}
{%- set parts = m.content.split('</think>') %}{% set ns.text = ns.text ~ m.role ~ ': ' ~ parts[-1].strip() + '\n' %}
{%- if m.content is string and 'x' in m.content and m.role == 'user' %}{% set last = m %}{% endif %}
{%- endfor %}{{ ns.text }}{{ messages | map(attribute='role') | unique | list | length }}
{{- messages[0] | tojson | length }}{{ messages[1:] | length }}
{{- (messages | selectattr('role', 'equalto', 'user') | list)[-1].content[:3] | upper }}"""
    chat = [{"role": ["user", "assistant"][i % 2], "content": "long text " * 4000} for i in range(40)]
    text = ChatTemplate(source, max_seconds=20).render(chat)
    assert text.startswith("user: long text")
    assert text.endswith("LON")
    assert len(text) > 1_500_000
