"""The laws of lorafit.formats.template: published templates render as in transformers, and no template can do harm."""

# ruff: noqa: E501 -- published templates stand as they are

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from lorafit.errors import ModelError
from lorafit.formats.template import MAX_SOURCE, MAX_TEXT, PLAIN_TEMPLATE, ChatTemplate, TemplateRefusal

# The templates that these models were published with.
TEMPLATES = {
    "SmolLM2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n"
        "' + message['content'] + '<|im_end|>' + '\n"
        "'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n"
        "' }}{% endif %}"
    ),
    "Llama-3": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n"
        "\n"
        "'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
        "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n"
        "\n"
        "' }}{% endif %}"
    ),
    "Mistral-7B-v0.1": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
        "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
        "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "Phi-3": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{'<|system|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% elif message['role'] == 'user' %}{{'<|user|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n"
        "' + message['content'] + '<|end|>\n"
        "'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
        "' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    "Zephyr": (
        "{% for message in messages %}\n"
        "{% if message['role'] == 'user' %}\n"
        "{{ '<|user|>\n"
        "' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n"
        "' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n"
        "'  + message['content'] + eos_token }}\n"
        "{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n"
        "{% endif %}\n"
        "{% endfor %}"
    ),
    "Gemma-3": (
        "{{ bos_token }}\n"
        "{%- if messages[0]['role'] == 'system' -%}\n"
        "    {%- if messages[0]['content'] is string -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'] + '\n"
        "\n"
        "' -%}\n"
        "    {%- else -%}\n"
        "        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n"
        "\n"
        "' -%}\n"
        "    {%- endif -%}\n"
        "    {%- set loop_messages = messages[1:] -%}\n"
        "{%- else -%}\n"
        '    {%- set first_user_prefix = "" -%}\n'
        "    {%- set loop_messages = messages -%}\n"
        "{%- endif -%}\n"
        "{%- for message in loop_messages -%}\n"
        "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}\n"
        '        {{ raise_exception("Conversation roles must alternate '
        'user/assistant/user/assistant/...") }}\n'
        "    {%- endif -%}\n"
        "    {%- if (message['role'] == 'assistant') -%}\n"
        '        {%- set role = "model" -%}\n'
        "    {%- else -%}\n"
        "        {%- set role = message['role'] -%}\n"
        "    {%- endif -%}\n"
        "    {{ '<start_of_turn>' + role + '\n"
        '\' + (first_user_prefix if loop.first else "") }}\n'
        "    {%- if message['content'] is string -%}\n"
        "        {{ message['content'] | trim }}\n"
        "    {%- elif message['content'] is iterable -%}\n"
        "        {%- for item in message['content'] -%}\n"
        "            {%- if item['type'] == 'image' -%}\n"
        "                {{ '<start_of_image>' }}\n"
        "            {%- elif item['type'] == 'text' -%}\n"
        "                {{ item['text'] | trim }}\n"
        "            {%- endif -%}\n"
        "        {%- endfor -%}\n"
        "    {%- else -%}\n"
        '        {{ raise_exception("Invalid content type") }}\n'
        "    {%- endif -%}\n"
        "    {{ '<end_of_turn>\n"
        "' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}\n"
        "    {{'<start_of_turn>model\n"
        "'}}\n"
        "{%- endif -%}\n"
    ),
    "Qwen3": r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""",
}

Message = dict[str, Any]
TOOLS: list[Message] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The "weather" in <a> city & its surroundings',
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "où"}}},
        },
    }
]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CONVERSATIONS = {
    "one question": [user("Hi")],
    "three turns": [user(" Hi\n"), assistant("Hello <|im_end|>"), user("日本 <b>&'\"")],
    "a system prompt": [system("Be brief."), user("a"), assistant("b"), user("c"), assistant("d")],
    "reasoning in the text": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c"), assistant("d")],
    "reasoning by an old name": [user("a"), assistant("b", thinking="hm")],
    "a tool": [user("w?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": '{"t": 3}'}, assistant("3")],
    "content in parts": [user([{"type": "text", "text": "hi"}])],
    "two questions in a row": [user("a"), user("b")],
    "nothing": [],
}


def render(source: str, messages: list[Message] | None = None, **options: Any) -> str:
    return ChatTemplate(source, "model: chat template").render(messages or [], **options)


def outcome(function: Any, *args: Any, **options: Any) -> tuple[str, str]:
    """What rendering gives: the text, or the message it ends with."""
    try:
        return "text", function(*args, **options)
    except ModelError as error:
        return "refused", error.what
    except (TemplateError, TypeError, ValueError) as error:  # what transformers lets through
        return "refused", str(error)


@pytest.mark.parametrize("model", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_published_templates_render_as_in_transformers(model: str, conversation: str) -> None:
    """Text or refusal, with and without tools and generation prompt, is that of transformers."""
    messages, source = CONVERSATIONS[conversation], TEMPLATES[model]
    for tools in (None, TOOLS):
        for prompt in (False, True):
            options = {
                "tools": tools,
                "add_generation_prompt": prompt,
                "bos_token": "<s>",
                "eos_token": "</s>",
                "enable_thinking": False,
            }
            kind, text = outcome(
                lambda options=options: render_jinja_template([messages], chat_template=source, **options)[0][0]
            )
            ours = outcome(render, source, messages, **options)
            assert ours[0] == kind
            assert ours[1] == text if kind == "text" else text in ours[1]


def test_a_template_refuses_messages_with_its_own_words() -> None:
    """`raise_exception` becomes a TemplateRefusal at the template's place, whose `what` is the template's message."""
    with pytest.raises(TemplateRefusal) as refusal:
        render(TEMPLATES["Mistral-7B-v0.1"], CONVERSATIONS["two questions in a row"])
    assert refusal.value.place == "model: chat template"
    assert refusal.value.what.startswith("Conversation roles must alternate")


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
    expected = render_jinja_template([[user("hi")]], chat_template=source)[0][0]
    assert render(source, [user("hi")]) == expected


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
    sources = [source for name, source in BOMBS.items() if name not in ("slow comparisons", "nested loops")]
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
    messages = [user("hi")]
    with pytest.raises(ModelError):
        render(source, messages)
    assert messages == [user("hi")]


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% for %}",
        "{{ 'a' | nosuch }}",
        "{{ " + "(" * 9000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "x" * (MAX_SOURCE + 1),
    ],
)
def test_a_source_that_does_not_compile_is_one_line(source: str) -> None:
    """Bad syntax, unknown filters, too deep or too long a source are a ModelError when the template is made."""
    with pytest.raises(ModelError) as error:
        ChatTemplate(source, "model: chat template")
    assert "\n" not in str(error.value)


def test_the_budget_is_for_one_rendering() -> None:
    """A template renders as often as one likes, also after it was refused once."""
    template = ChatTemplate("{% for m in messages %}{{ m.content * m.times }}{% endfor %}", "model")
    for _ in range(40):
        assert len(template.render([{"content": "x", "times": MAX_TEXT}])) == MAX_TEXT
    with pytest.raises(ModelError):
        template.render([{"content": "x", "times": MAX_TEXT + 1}])
    assert template.render([{"content": "x", "times": 2}]) == "xx"


def test_the_date_can_be_given() -> None:
    """`strftime_now` prints the date of the call, which makes a rendering repeatable."""
    source = "{{ strftime_now('%d %B %Y') }}"
    assert render(source, today=datetime(2026, 11, 3)) == "03 November 2026"
    assert render(source) == datetime.now().strftime("%d %B %Y")


def test_the_plain_template_reads_as_documented() -> None:
    """Heads, contents, tools and calls of the plain template, an answer closed by the end-of-text token."""
    messages = [system("S"), user("U"), assistant("A", tool_calls=[{"name": "f"}, {"name": "g"}])]
    messages += [{"role": "tool", "content": {"t": 3}}, assistant(None, tool_calls=[{"name": "h"}]), user("V")]
    text = render(PLAIN_TEMPLATE, messages, tools=[{"name": "f"}], bos_token="<s>", eos_token="</s>")
    assert text == (
        '<s>### Tools:\n{"name": "f"}\n\n### System:\nS\n\n### User:\nU\n\n'
        '### Assistant:\nA\n{"name": "f"}\n{"name": "g"}</s>\n\n### Tool:\n{"t": 3}\n\n'
        '### Assistant:\n{"name": "h"}</s>\n\n### User:\nV\n\n'
    )


def test_the_plain_generation_prompt_ends_where_the_answer_begins() -> None:
    """What precedes a plain answer is the generation prompt, to the letter."""
    prompt = render(PLAIN_TEMPLATE, [user("U")], add_generation_prompt=True, eos_token="</s>")
    assert render(PLAIN_TEMPLATE, [user("U"), assistant("A")], eos_token="</s>") == prompt + "A</s>\n\n"
