"""The laws of lorafit.formats.sandbox: the budget changes no honest template, and no template can do harm."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from lorafit.errors import ModelError
from lorafit.formats.sandbox import MAX_TEXT
from lorafit.formats.template import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source: str, *messages: dict[str, Any]) -> str:
    return ChatTemplate(source, "model: chat template").render(list(messages))


@pytest.mark.parametrize(
    "source",
    [
        "{{ {'a': '<é>', 'b': [1, none, true]} | tojson }}",
        "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}",
        "{{ [1, 2] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
        "{% generation %}{% set x = 1 %}{{ 'a' }}{% endgeneration %}{{ x is defined }}",
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
        "{% for i in range(9) %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "{% for i in 'abc' %}{{ loop.index ~ loop.length ~ loop.last ~ (loop.previtem or '') }}{% endfor %}",
        "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k ~ v }}{% else %}none{% endfor %}",
        "{% macro twice(x) %}{{ x * 2 }}{% endmacro %}{{ twice('ab') }}{{ 2 ** 8 }}{{ 7 // 2 + 7 % 4 }}",
        "{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{{ ['b', 'a'] | sort | join(', ') }}{{ 'a-b'.split('-') | list }}{{ [3, 4, 5][1:] }}{{ 'abcd'[::-1] }}",
        "{{ 'a\nb' | indent(2, true) }}{{ 'aXa' | replace('X', '-') | upper }}{{ ('x', 'y') | reverse | list }}",
        "{{ [{'r': 'u'}, {'r': 'a'}] | selectattr('r', 'equalto', 'a') | map(attribute='r') | first }}",
        "{% set block %}  two\n  lines{% endset %}{{ block | trim }}{% filter upper %}x{% endfilter %}",
        "   {% if true %}\n a\n   {% endif %}\n b {{- ' c ' -}} d\n",
        "{{ missing }}|{{ missing is defined }}|{{ documents is none }}|{{ tools is none }}|{{ messages }}",
    ],
)
def test_every_construct_renders_as_in_transformers(source: str) -> None:
    """What the budget rewrites (loops, concatenation, slices, filters, literals) keeps its meaning."""
    expected = render_jinja_template([[USER]], chat_template=source)[0][0]
    assert render(source, USER) == expected


DOUBLING = "{% set ns = namespace(a='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}"
BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a long list": "{{ ([1] * 10**9) | length }}",
    "a long range": "{{ range(10**9) | list }}",
    "a big number": "{{ 10 ** 100000 }}",
    "squaring": "{% set ns = namespace(a=3) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "doubling with +": DOUBLING,
    "doubling with ~": DOUBLING.replace("ns.a + ns.a", "ns.a ~ ns.a"),
    "doubling a list": DOUBLING.replace("'aaaaaaaaaa'", "[1]"),
    "doubling in blocks": "{% set a = 'aaaaaaaa' %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 40,
    "lists of lists": "{% set a = ['lol'] %}" + "{% set a = [a, a, a, a] %}" * 40 + "{{ a }}",
    "dicts of dicts": "{% set a = dict(a='lol') %}" + "{% set a = dict(a=a, b=a) %}" * 40 + "{{ a | tojson }}",
    "equal lists": "{% set a, b = [1], [1] %}" + "{% set a, b = [a, a], [b, b] %}" * 40 + "{{ a == b }}",
    "many copies": "{% set a = 'x' * 4000000 %}" + "".join(f"{{% set a{n} = a[1:] %}}" for n in range(300)),
    "much output": "{% set a = 'x' * 3000000 %}{{ a }}{{ a }}",
    "replace": "{{ ('a' * 1000) | replace('a', 'b' * 100000) }}",
    "replace as a method": "{{ ('a' * 1000).replace('a', 'b' * 100000) }}",
    "join": "{{ range(99999) | join('b' * 100000) }}",
    "join as a method": "{{ ('b' * 100000).join(['a'] * 90000) }}",
    "letters as a list": "{{ ('字' * 3900000) | list | length }}",
    "letters as arguments": "{{ dict(*('字' * 3900000)) }}",
    "split": "{% for i in range(99) %}{% set x = ('a ' * 1900000).split() %}{% endfor %}",
    "mapped": "{{ range(1000) | map('replace', '1', 'b' * 3000000) | list | length }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "an indent of JSON": "{{ [1] | tojson(indent=1000000000) }}",
    "center": "{{ 'a'.center(1000000000) }}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "a date": "{{ strftime_now('%c' * 100000) }}",
    "a macro of itself": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "a tree of macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "slow comparisons": "{% set a = 'x' * 3900000 %}{% for i in range(99999) %}{{ 'y' in a }}{% endfor %}",
    "many slow tests": "{% set a = 'x' * 3900000 %}" + "{% if a is lower %}{% endif %}" * 300,
    "many slow filters": "{% set a = '1' * 3900000 %}" + "{{ a | float }}" * 4000,
    "many slow comparisons": "{% set a = ['x'] * 900000 %}" + "{{ 'y' in a }}" * 300,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(bomb: str) -> None:
    """A template that would run or grow without end ends in one line, after at most about a second of work."""
    start = time.thread_time()
    with pytest.raises(ModelError) as error:
        render(BOMBS[bomb])
    assert time.thread_time() - start < 1.6  # MAX_SECONDS and the step under way
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model: chat template: ")


def test_bombs_stay_small() -> None:
    """All bombs one after the other add less than 200 MB to a process's peak memory."""
    script = (
        "import json, resource, sys\n"
        "from lorafit.errors import ModelError\n"
        "from lorafit.formats.template import ChatTemplate\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for source in json.load(sys.stdin):\n"
        "    try: ChatTemplate(source, 'model').render([])\n"
        "    except ModelError: pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    sources = [source for name, source in BOMBS.items() if "slow" not in name and name != "nested loops"]
    done = subprocess.run([sys.executable, "-c", script], input=json.dumps(sources), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000  # kilobytes


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ (namespace | map(attribute='__init__') | first).__globals__ }}",
        "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | first | length + 1 }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.__class__.__mro__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.system('true') }}",
        "{{ '' | attr('__class__') }}",
    ],
)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    """Python's internals, files and the caller's objects are out of reach."""
    messages = [dict(USER)]
    with pytest.raises(ModelError):
        ChatTemplate(source, "model: chat template").render(messages)
    assert messages == [USER]


def test_the_budget_is_for_one_rendering() -> None:
    """A template renders as often as one likes, also after it was refused once."""
    template = ChatTemplate("{% for m in messages %}{{ m.content * m.times }}{% endfor %}", "model")
    for _ in range(40):
        assert len(template.render([{"content": "x", "times": MAX_TEXT}])) == MAX_TEXT
    with pytest.raises(ModelError):
        template.render([{"content": "x", "times": MAX_TEXT + 1}])
    assert template.render([{"content": "x", "times": 2}]) == "xx"
