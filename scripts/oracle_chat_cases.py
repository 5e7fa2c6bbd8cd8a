"""Chats, templates and values for `oracle_chat.py`."""

import json

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <of> a place",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": 'A "city"'},
                    "days": {"type": "integer", "default": 1},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds 日本 & more\n\t\u2028\\",
            "parameters": {
                "type": "object",
                "properties": {
                    "tags": {"type": ["array", "null"], "items": {"type": "string"}},
                    "weight": {"type": "number", "maximum": 1e22, "minimum": -0.5},
                    "exact": {"type": "boolean", "default": True},
                },
            },
        },
    },
]

CALL = {"id": "abcdefghi", "name": "get_weather", "arguments": {"city": "Köln\n", "days": 3}}
SECOND = {
    "id": "123456789",
    "name": "search",
    "arguments": {"tags": ["a", None], "weight": 1e-07, "exact": True, "none": None, "deep": {"a": []}},
}


def chats():
    """Chats with everything in them, with tools and without, to think and not to."""
    system = {"role": "system", "content": " You are <kind> & short. "}
    user = {"role": "user", "content": "Hi there,\n\n  {{ how }} are you? 😀 "}
    answer = {"role": "assistant", "content": " Fine. "}
    thought = {"role": "assistant", "content": "Fine.", "thinking": "\nHm. They ask.\n"}
    within = {"role": "assistant", "content": "<think>\nOld.\n</think>\n\nSo."}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    calls = {"role": "assistant", "content": "I call.", "tool_calls": [CALL, SECOND]}
    thinks = {"role": "assistant", "content": "", "thinking": "Which?", "tool_calls": [CALL]}
    result = {"role": "tool", "content": '{"degrees": 3.0}', "tool_call_id": "abcdefghi"}
    named = {**result, "tool_name": "get_weather"}
    second = {"role": "tool", "content": "rain", "tool_call_id": "123456789", "tool_name": "search"}
    turns = [
        [user],
        [system, user],
        [system, user, answer, user],
        [user, thought, user, within, user],
        [user, answer],
        [user, user],
        [answer, user],
        [user, call, result],
        [system, user, call, named, answer, user],
        [user, calls, named, second],
        [user, calls, named, second, answer, user, thinks, result],
        [user, thinks, named, thought, user],
        [{"role": "user", "content": ""}],
        [{"role": "narrator", "content": "Once."}],
        [system],
    ]
    for messages in turns:
        for tools in ([], TOOLS):
            for think in (None, "on", "off", "high"):
                for prompt in (True, False):
                    yield {
                        "messages": messages,
                        "tools": tools,
                        "think": think,
                        "add_generation_prompt": prompt,
                    }


# What templates do, one thing a line; what we lack is listed in `crates/chat/src/jinja/python.rs`. `p` is `parameters` of the first tool, see VALUES.
FEATURES = r"""
{{ p.s.strip() }}|{{ p.s.lstrip() }}|{{ p.s.rstrip() }}|{{ p.s.strip('aé ') }}|{{ p.s.lstrip(' a') }}
{{ 'a,b,,c'.split(',') }}{{ 'a b  c '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ 'abc'.split('x')[-1] }}
{{ 'a-b-c'.partition('-') }}{{ 'a-b-c'.rpartition('-') }}
{{ 'a\nb\r\nc'.splitlines() }}{{ 'a\nb'.splitlines(True) }}
{{ 'abc'.startswith('a') }}{{ 'abc'.startswith(('x', 'ab')) }}{{ 'abc'.endswith('bc') }}{{ 'abc'.endswith(('x',)) }}
{{ 'aXbX'.replace('X', 'yy') }}{{ 'aXbX'.replace('X', 'yy', 1) }}{{ 'aaa' | replace('a', 'b', 2) }}
{{ 'hello World'.title() }}{{ "it's o'clock".title() }}{{ 'hELLO'.capitalize() }}{{ 'ÉtÉ'.lower() }}{{ 'straße'.upper() }}
{{ 'abc'.find('c') }}{{ 'abc'.find('x') }}{{ 'abcabc'.rfind('b') }}{{ 'abcabc'.count('b') }}{{ 'abc'.index('b') }}{{ 'aéb'.find('b') }}
{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ 'a'.isalpha() }}{{ ' '.isspace() }}{{ 'A'.isupper() }}{{ 'a'.islower() }}{{ 'é'.isascii() }}{{ '1.5'.isnumeric() }}
{{ ','.join(['a', 'b']) }}{{ ['a', 1, none, true] | join('-') }}{{ p.rows | join(',', attribute='name') }}
{{ '{} and {}'.format(1, 'a') }}{{ '{0}{1}{0}'.format('a', 'b') }}{{ '{name}'.format(name='x') }}{{ '%5d|%-5s|%05.1f|%x' | format(3, 'a', 2.25, 255) }}
{{ 'abc'.zfill(5) }}{{ 'abc'.center(9, '*') }}{{ 'abc'.ljust(5) }}|{{ 'abc'.rjust(5) }}
{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}{{ 'aBc'.swapcase() }}{{ 'ß'.casefold() }}
{{ 'abc'[0] }}{{ 'abc'[-1] }}{{ 'abcdef'[1:3] }}{{ 'abcdef'[:-1] }}{{ 'abcdef'[::2] }}{{ 'abcdef'[::-1] }}{{ 'aéb😀'[1:] }}{{ p.s[-3:] }}
{{ p.l[1:] }}{{ p.l[:-1] }}{{ p.l[::-1] }}{{ p.l[10:] }}{{ p.l[-1] }}{{ p.l[5:2] }}
{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1, 'x'] ~ {'a': 1} }}
{{ 1 / 2 }} {{ 4 / 2 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ 7.5 // 2 }} {{ 7.5 % 2 }}
{{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e100 }} {{ 1e16 }} {{ 123456789012345678 }} {{ 1e-5 }} {{ 0.0001 }} {{ -0.0 }} {{ 1e22 }} {{ 1.5e300 * 1e10 }}
{{ 'ab' * 3 }}{{ [1, 2] * 2 }}{{ [1] + ['a'] }}{{ [1, 2] + p.l }}
{{ 'a' in 'abc' }}{{ 'x' not in 'abc' }}{{ 1 in [1, 2] }}{{ 'a' in p.d }}{{ 'zz' in p.d }}
{{ none }}{{ true }}{{ false }}{{ p.n }}{{ p.missing }}{{ [none, true, 1.0, 'a', "it's", 'q"q', 'b\\n'] }}{{ {'a': {'b': [1]}} }}{{ (1, 2) }}{{ (1,) }}{{ [] }}{{ {} }}
{{ ['\n', '\t', '\x07', '\u00e9', '\'"'] }}
{{ p }}
{{ p.d.get('a') }}{{ p.d.get('zz') }}{{ p.d.get('zz', 'no') }}{{ p.d['a'] }}{{ p.d.a }}{{ p['d']['a'] }}{{ p.d['zz'] is defined }}
{{ p.d.keys() | list }}{{ p.d.values() | list }}{{ p.d.items() | list }}{{ p.d | items | list }}{{ p.d | dictsort }}{{ p.d | length }}
{% for k, v in p.d.items() %}{{ loop.index }}{{ k }}={{ v }};{% endfor %}{% for k in p.d %}{{ k }}{% endfor %}
{% for x in p.l %}{{ loop.index }}/{{ loop.index0 }}/{{ loop.revindex }}/{{ loop.revindex0 }}/{{ loop.first }}/{{ loop.last }}/{{ loop.length }}/{{ loop.cycle('a', 'b') }}/{{ loop.previtem }}/{{ loop.nextitem }}/{{ loop.changed(x) }}/{{ loop.depth }};{% endfor %}
{% for x in [] %}{{ x }}{% else %}none{% endfor %}{% for x in p.l if x != 2 %}{{ x }}{{ loop.length }}{% endfor %}{% for a, b in [(1, 2), [3, 4]] %}{{ a }}{{ b }}{% endfor %}
{% for x in range(10) %}{% if x == 2 %}{% continue %}{% endif %}{% if x == 5 %}{% break %}{% endif %}{{ x }}{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{% set ns = namespace(a=1, b='x') %}{% for x in p.l %}{% set ns.a = ns.a + 1 %}{% set y = x %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ y is defined }}
{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% for i in [1] %}{% set x = 3 %}{% endfor %}{{ x }}{% set a, b = 1, 2 %}{{ a }}{{ b }}
{% set block %}text {{ p.i }}{% endset %}{{ block }}|{{ block | length }}{% set f | upper %}abc{% endset %}{{ f }}
{% macro m(a, b=2, c='x') %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }}{{ m(1, c=3) }}{{ m(b=5, a=4) }}{{ m() }}{{ m.name }}
{% macro m(a) %}<{{ caller(a) }}>{% endmacro %}{% call(x) m('q') %}{{ x }}!{% endcall %}
{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}{% filter upper %}abc{% endfilter %}
{% if p.missing %}a{% elif p.l %}b{% else %}c{% endif %}{{ 'y' if p.i > 2 else 'n' }}{{ 'y' if false }}|{{ p.missing | default('d') }}{{ '' | default('d') }}{{ '' | default('d', true) }}{{ none | default('d') }}{{ p.n | d('x', boolean=true) }}
{{ p.missing is defined }}{{ p.missing is undefined }}{{ p.n is none }}{{ p.s is string }}{{ p.i is number }}{{ p.i is integer }}{{ p.f is float }}{{ p.b is boolean }}{{ p.d is mapping }}{{ p.l is sequence }}{{ p.l is iterable }}{{ p.s is iterable }}{{ p.s is sequence }}{{ p.d is iterable }}{{ p.b is true }}{{ p.b is false }}{{ p.i is odd }}{{ p.i is even }}{{ 6 is divisibleby 3 }}{{ true is number }}{{ true is integer }}{{ p.d is sequence }}
{{ 'a' is in 'abc' }}{{ 1 is eq 1 }}{{ 1 is equalto 2 }}{{ 1 is sameas 1 }}{{ 'a' is lower }}{{ 'A' is upper }}{{ 2 is gt 1 }}{{ 2 is ge(3) }}{{ p.i is not string }}{{ 'upper' is filter }}{{ 'odd' is test }}
{{ p.l | first }}{{ p.l | last }}{{ p.l | length }}{{ p.l | sum }}{{ p.l | max }}{{ p.l | min }}{{ p.l | reverse | list }}{{ 'abc' | reverse }}{{ [3, 1, 2] | sort }}{{ [3, 1, 2] | sort(reverse=true) }}{{ ['b', 'A', 'c'] | sort }}{{ ['b', 'A'] | sort(case_sensitive=true) }}{{ [1, 2, 1] | unique | list }}{{ [] | first }}
{{ p.rows | map(attribute='name') | list }}{{ p.rows | selectattr('on') | map(attribute='name') | join }}{{ p.rows | rejectattr('on') | list | length }}{{ p.rows | selectattr('name', 'equalto', 'b') | list }}{{ p.rows | selectattr('n', 'gt', 1) | map(attribute='n') | list }}{{ p.rows | selectattr('zz', 'defined') | list }}{{ p.rows | sort(attribute='n', reverse=true) | map(attribute='name') | list }}{{ p.rows | sum(attribute='n') }}
{% for key, rows in p.rows | groupby('on') %}{{ key }}:{{ rows | map(attribute='name') | join(',') }};{% endfor %}
{{ [1, 2, 3, 4] | select('odd') | list }}{{ [1, 2, 3] | reject('equalto', 2) | list }}{{ ['a', ''] | select | list }}{{ ['a', 'b'] | map('upper') | list }}{{ [[1, 2], [3]] | map('length') | list }}{{ ['1', '2'] | map('int') | sum }}{{ p.rows | map(attribute='zz', default='-') | list }}
{{ [1, 2, 3, 4, 5] | batch(2) | list }}{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}
{{ '3' | int }}{{ 'x' | int }}{{ 'x' | int(5) }}{{ 3.9 | int }}{{ '3.7' | int }}{{ '3.5' | float }}{{ 'x' | float }}{{ 3 | float }}{{ 3.14159 | round(2) }}{{ 2.5 | round }}{{ 3.7 | round(0, 'floor') }}{{ 3.2 | round(method='ceil') }}{{ -3 | abs }}{{ 1 | string + 'a' }}{{ true | string }}{{ none | string }}{{ 1.0 | string }}
{{ 'a b' | title }}{{ 'aBC' | capitalize }}{{ '  x ' | trim }}|{{ 'xxaxx' | trim('x') }}{{ 'abc' | upper }}{{ 'a\nb\n\nc' | indent(2) }}{{ 'a\nb' | indent(4, true) }}{{ 'a\n\nb' | indent(2, blank=true) }}{{ 'abcdefghij' | truncate(length=6, killwords=true, end='..', leeway=0) }}{{ 'abc' | list }}
{{ '<a href="x">&\'' | e }}{{ '<b>' | escape }}{{ '<b>' | safe }}{{ '<b>x</b>' | striptags }}
{{ {'a': 1, 'b': [1, 2, {'c': none}]} | tojson }}|{{ 'é"<>&\'\n' | tojson }}|{{ [1.0, 1e100, true, none, 'x'] | tojson }}|{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}|{{ {'a': [1, {}], 'b': [], 'c': {}} | tojson(indent=2) }}|{{ [1, 2] | tojson(indent=4) }}|{{ 'é😀' | tojson(ensure_ascii=true) }}|{{ {'a': 1, 'b': [1, 2]} | tojson(separators=(',', ':')) }}|{{ 'é' | tojson(true) }}|{{ 1 | tojson }}{{ [1] | tojson(indent=0) }}{{ {'a': 1} | tojson(indent=2, separators=(', ', ' = ')) }}{{ [1] | tojson(indent='\t') }}{{ {1: 2, none: 3, true: 4, 1.5: 5} | tojson }}{{ (1, 2) | tojson }}
{{ p | tojson(indent=4) }}
{{ range(3) | list }}{{ range(1, 4) | list }}{{ range(5, 0, -2) | list }}{{ dict(a=1, b=2) }}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner(', ') %}{{ j() }}{{ j() }}
{{ not true }}{{ 1 and 2 }}{{ 0 or 'x' }}{{ none or [] }}{{ '' and 1 }}{{ not '' }}{{ 1 < 2 < 3 }}{{ 1 == 1.0 }}{{ 'a' < 'b' }}{{ [1, 2] < [1, 3] }}{{ 'a' == 1 }}{{ none == false }}{{ 1 == true }}{{ [1] == [1] }}{{ {'a': 1} == {'a': 1} }}{{ 2 != 2.0 }}
{{ -p.i }}{{ p.i - 1 }}{{ p.i -1 }}{{ (1 + 2) * 3 }}{{ 1 + 2 * 3 }}{{ 2 * 3 ** 2 }}{{ -2 ** 2 }}{{ 10 - 2 - 3 }}{{ 'a' ~ 1 + 2 }}{{ 1 if true else 2 + 3 }}
{{ "a\tb\\n\x41\u00e9" }}{{ 'a' 'b' }}{{ "it's" }}{{ 'a\'b' }}{{ 1_000 }}{{ 0x1F }}{{ 0b11 }}{{ 0o17 }}{{ 'a\qb' }}
  {%- raw %} {{ x }} {% y %} {%- endraw %}{# comment #}{#- trimmed -#}  x
{% for x in [1, 2] -%}  {{ x }}  {%- endfor %}|{%- if true -%}  y  {%- endif -%}|
{%+ if true %}a{% endif +%}  b{{- ' c' -}}   d
{{ strftime_now('%d %b %Y, %A %B %j %H:%M:%S %y %-d %p %I %%') }}
{{ raise_exception('no') }}
{{ p.missing.more }}
{{ p.missing['more'] }}
{{ missing_function() }}
{{ 'a' + 1 }}
{{ 1 / 0 }}
{{ p.s | no_such_filter }}
{{ [1, 2].append(3) }}
{{ p.d.update({'x': 1}) }}
{{ 'a'.__class__ }}
{{ ''.__class__.__mro__ }}
{% if p.s is no_such_test %}{% endif %}
{% for x in 5 %}{% endfor %}
{{ p.l['a'] }}|{{ p.l[99] }}|{{ p.s.nothing }}
{{ messages[0]['content'] }}{{ messages[-1].role }}{{ messages | length }}{{ tools | length }}{{ tools is none }}{{ documents is none }}{{ enable_thinking is defined }}{{ messages[0].tool_calls is defined }}{{ messages[0].get('tool_calls') }}
{% set m = messages[1:] %}{{ m | length }}{% set messages = [{'role': 'x'}] + messages %}{{ messages[0].role }}{{ messages | map(attribute='role') | join(' ') }}
{{ bos_token }}{{ eos_token ~ 'x' }}{{ loop is defined }}
""".strip("\n").split("\n")

VALUES = {
    "s": " aé Bc😀 ",
    "t": "x,y,,z",
    "e": "",
    "i": 3,
    "z": 0,
    "m": -7,
    "f": 2.5,
    "g": 1e15,
    "b": True,
    "no": False,
    "n": None,
    "l": [1, 2, 3],
    "w": ["b", "a", "B", "é", "b"],
    "d": {"b": 1, "a": "x", "C": None},
    "rows": [
        {"name": "a", "n": 1, "on": True},
        {"name": "b", "n": 3, "on": False},
        {"name": "c", "n": 2, "on": True},
    ],
}

FIRST = "{%- set p = tools[0].function.parameters -%}"


def case(template, values=None):
    """A template over values, which come as a tool's parameters: those are handed on as they are."""
    function = {"name": "f", "description": "x", "parameters": values or VALUES}
    return {
        "template": FIRST + template,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": function}],
        "bos": "<s>",
        "eos": "</s>",
    }


def features():
    for line in FEATURES:
        # By itself, too, each of what stands in one line: a part that is refused hides the others.
        yield case(line)
        if "{%" not in line:
            for part in line.split("}}"):
                if "{{" in part:
                    yield case(part + "}}")


class Expressions:
    """Expressions of templates, mostly of types that go together."""

    def __init__(self, choose):
        self.choose = choose

    def pick(self, *options):
        return self.choose.choice(options)

    def small(self):
        return str(self.choose.randint(-4, 4))

    def any(self, depth):
        return self.pick(self.text, self.text, self.number, self.truth, self.list, self.dict)(depth)

    def text(self, depth):
        if depth <= 0:
            return self.pick(
                "p.s", "p.t", "p.e", "p.rows[0].name", "'a'", "'b c'", "'é,\\n'", "p.d.a", "'Xy'"
            )
        a = self.text(depth - 1)
        b = self.text(depth - 2)
        return self.pick(
            f"{a}.{self.pick('upper', 'lower', 'strip', 'lstrip', 'rstrip', 'title', 'capitalize')}()",
            f"({a} + {b})",
            f"({a} ~ {self.any(depth - 2)})",
            f"{a}.replace({b}, 'q')",
            f"{a}.strip({self.pick(repr(' '), repr('a '), repr('é'))})",
            f"{a}.split({self.pick(repr(','), repr(' '), repr('b'))})[{self.pick('0', '-1')}]",
            f"({a})[{self.small()}:{self.small()}]",
            f"({a})[{self.small()}:]",
            f"({a})[:{self.small()}]",
            f"({a})[::-1]",
            f"({a} | {self.pick('trim', 'upper', 'lower', 'title', 'capitalize', 'string')})",
            f"({a} | default({b}))",
            f"({a} | replace({b}, 'q'))",
            f"({a} | indent({self.choose.randint(0, 4)}))",
            f"({self.list(depth - 1)} | join({self.pick('', repr(', '))}))",
            f"({a} if {self.truth(depth - 2)} else {b})",
            f"({self.any(depth - 1)} | tojson)",
            f"({self.any(depth - 1)} | string)",
            f"({a} * {self.choose.randint(0, 3)})",
            f"', '.join({self.list(depth - 1)} | map('string'))",
            f"('%s/%s' | format({a}, {self.any(depth - 2)}))",
            f"'{{}}-{{}}'.format({a}, {self.number(depth - 2)})",
        )

    def number(self, depth):
        if depth <= 0:
            return self.pick("p.i", "p.z", "p.m", "p.f", "0", "1", "2", "10", "1.5", "0.1", "3.0", "p.g")
        a, b = self.number(depth - 1), self.number(depth - 2)
        return self.pick(
            f"({a} {self.pick('+', '-', '*', '/', '//', '%')} {b})",
            f"({a} ** {self.pick('2', '0', '1')})",
            f"({self.list(depth - 1)} | length)",
            f"({self.text(depth - 1)} | length)",
            f"{self.text(depth - 1)}.{self.pick('find', 'rfind', 'count')}({self.pick(repr('a'), repr('b'), repr('é'))})",
            f"({a} | {self.pick('int', 'float', 'abs', 'round')})",
            f"({a} | round({self.choose.randint(0, 2)}))",
            f"({self.text(depth - 1)} | int)",
            f"(-{a})",
            f"({a} if {self.truth(depth - 2)} else {b})",
            f"([{a}, {b}] | {self.pick('sum', 'max', 'min', 'first', 'last')})",
        )

    def truth(self, depth):
        if depth <= 0:
            return self.pick("p.b", "p.no", "true", "false", "(p.missing is defined)", "(p.n is none)")
        a, b = self.number(depth - 1), self.number(depth - 2)
        return self.pick(
            f"({a} {self.pick('<', '<=', '>', '>=', '==', '!=')} {b})",
            f"({self.text(depth - 1)} {self.pick('<', '==', '!=', 'in', 'not in', '>=')} {self.text(depth - 2)})",
            f"(not {self.any(depth - 1)})",
            f"({self.truth(depth - 1)} {self.pick('and', 'or')} {self.truth(depth - 2)})",
            f"{self.text(depth - 1)}.{self.pick('startswith', 'endswith')}({self.text(depth - 2)})",
            f"{self.text(depth - 1)}.{self.pick('isdigit', 'isalpha', 'isalnum', 'isspace', 'isupper', 'islower')}()",
            f"({self.any(depth - 1)} is {self.pick('string', 'number', 'mapping', 'sequence', 'iterable', 'none', 'defined', 'boolean', 'integer', 'float', 'true')})",
            f"({self.any(depth - 1)} in {self.list(depth - 1)})",
            f"({self.any(depth - 1)} == {self.any(depth - 1)})",
        )

    def list(self, depth):
        if depth <= 0:
            return self.pick("p.l", "p.w", "[]", "[1, 'a', none]", "['x']", "p.rows", "range(3) | list")
        a = self.list(depth - 1)
        return self.pick(
            f"[{self.any(depth - 1)}, {self.any(depth - 2)}]",
            f"({a})[{self.small()}:{self.small()}]",
            f"({a})[::-1]",
            f"({a} | reverse | list)",
            f"(({a}) + {self.list(depth - 2)})",
            f"{self.text(depth - 1)}.split({self.pick('', repr(','), repr(' '))})",
            f"({self.text(depth - 1)} | list)",
            f"(p.w | {self.pick('sort', 'unique', 'map(' + repr('upper') + ')', 'select')} | list)",
            f"(p.rows | map(attribute={self.pick(repr('name'), repr('n'), repr('on'))}) | list)",
            f"(p.rows | {self.pick('selectattr', 'rejectattr')}('on') | map(attribute='n') | list)",
            f"({a} | {self.pick('map', 'map')}({self.pick(repr('string'), repr('tojson'))}) | list)",
            f"({self.dict(depth - 1)}).{self.pick('keys', 'values', 'items')}() | list",
            f"({self.dict(depth - 1)} | {self.pick('dictsort', 'items', 'list')} | list)",
            f"({a} | batch(2) | list)",
        )

    def dict(self, depth):
        if depth <= 0:
            return self.pick("p.d", "{}", "{'k': 1}", "p.rows[1]")
        return self.pick(
            f"{{'a': {self.any(depth - 1)}, {self.text(depth - 2)}: {self.any(depth - 2)}}}",
            f"dict(x={self.any(depth - 1)})",
            "p.rows[0]",
        )


def expression(choose):
    made = Expressions(choose)
    depth = choose.randint(1, 4)
    return case("{{ " + made.any(depth) + " }}")


def statements(choose):
    """Blocks in each other, with white space of all kinds around them."""
    made = Expressions(choose)

    def space():
        return choose.choice(["", "", " ", "\n", "  \n", "\n\n", "\n  ", "\t", "a", "b \n", "\r\n"])

    def tag(body):
        left = choose.choice(["", "", "", "-", "+"])
        right = choose.choice(["", "", "", "-", "+"])
        return space() + "{%" + left + " " + body + " " + right + "%}" + space()

    def some(depth):
        return "".join(one(depth) for _ in range(choose.randint(0, 3)))

    def one(depth):
        kind = choose.randrange(10) if depth > 0 else choose.randrange(4)
        left, right = choose.choice(["", "-"]), choose.choice(["", "-"])
        if kind == 0:
            return space() + choose.choice(["text", "x\n", " {", "}} ", "%}", "# ", "é"]) + space()
        if kind == 1:
            return space() + "{{" + left + " " + made.any(1) + " " + right + "}}" + space()
        if kind == 2:
            return space() + "{#" + left + " note " + right + "#}" + space()
        if kind == 3:
            return tag("set v = " + made.any(1)) + "{{ v }}"
        if kind == 4:
            return tag("if " + made.truth(1)) + some(depth - 1) + tag("else") + some(depth - 1) + tag("endif")
        if kind == 5:
            return tag("for x in " + made.list(0)) + "{{ loop.index }}" + some(depth - 1) + tag("endfor")
        if kind == 6:
            head = tag("for x in p.l if x " + choose.choice(["> 1", "!= 2"]))
            return (
                head
                + some(depth - 1)
                + choose.choice(["", tag("if x == 2") + tag("continue") + tag("endif")])
                + tag("endfor")
            )
        if kind == 7:
            return (
                "{%"
                + choose.choice(["", "-"])
                + " raw "
                + choose.choice(["", "-"])
                + "%}"
                + choose.choice(["{{ x }}", " {% if %} ", "y\n"])
                + tag("endraw")
            )
        if kind == 8:
            return tag("set v") + some(depth - 1) + tag("endset") + "{{ v }}"
        name = choose.choice(["m", "k"])
        # Said once more, since minijinja looks for what a macro takes from outside everywhere but in slices.
        return (
            tag(f"macro {name}(a, b=2)")
            + "{{ a }}{{ p and '' }}"
            + some(depth - 1)
            + tag("endmacro")
            + "{{ "
            + name
            + "(1) }}"
        )

    return case(some(3))


def json_value(choose, depth):
    kind = choose.randrange(9 if depth > 0 else 7)
    letters = "ab \"\\/\n\t\r\b\f\x00\x1f\x7f\x80é\u00ad\u200b\u2028日😀\ue000<>&'"
    if kind == 0:
        return choose.choice([None, True, False])
    if kind == 1:
        return choose.choice([0, 1, -1, 10**9, -(2**53), 2**63 - 1, choose.randint(-1000, 1000)])
    if kind in (2, 3):
        exponent = choose.randint(-30, 30)
        return choose.choice(
            [
                0.0,
                -0.0,
                1.0,
                1e16,
                1e15,
                1e-4,
                1e-5,
                123456.789e3,
                choose.uniform(-1, 1) * 10.0**exponent,
                round(choose.uniform(-100, 100), 2),
            ]
        )
    if kind in (4, 5, 6):
        return "".join(choose.choice(letters) for _ in range(choose.randint(0, 6)))
    if kind == 7:
        return [json_value(choose, depth - 1) for _ in range(choose.randint(0, 3))]
    return {json_key(choose): json_value(choose, depth - 1) for _ in range(choose.randint(0, 3))}


def json_key(choose):
    return "".join(choose.choice("abc é\"'_") for _ in range(choose.randint(1, 4)))


def prints_alike(value):
    """Whether we print it as Python does: no float with an exponent within, no letters that Python escapes."""
    if isinstance(value, (list, dict)):
        items = value if isinstance(value, list) else [*value.keys(), *value.values()]
        return all(
            prints_alike(item)
            and not isinstance(item, float)
            and (not isinstance(item, str) or item.isprintable())
            for item in items
        )
    return True


def values(choose):
    """Values as JSON and as Python prints them."""
    value = {"v": json_value(choose, 3)}
    printed = "{{ p.v }}|{{ p.v | string }}|" if prints_alike(value["v"]) else ""
    arguments = [
        choose.choice(["", "indent=2", "indent=4", "indent=0", "indent='\\t'", "indent=none"]),
        choose.choice(["", "", "ensure_ascii=true", "ensure_ascii=false"]),
        choose.choice(["", "", "sort_keys=true"]),
        choose.choice(["", "", "separators=(',', ':')", "separators=(', ', ' : ')"]),
    ]
    given = ", ".join(argument for argument in arguments if argument)
    # What a template could not say, it is not asked: keys are text here.
    assert json.loads(json.dumps(value)) == value
    return case(printed + "{{ p.v | tojson(" + given + ") }}", value)


def date(choose):
    letters = "dmyYHIMSpBbhAajFTDe%"
    words = [
        choose.choice([" ", ":", ", ", "%" + choose.choice(letters), "%-" + choose.choice("dmHIMSjy")])
        for _ in range(8)
    ]
    made = case("{{ strftime_now('" + "".join(words).rstrip("%") + "') }}")
    return {**made, "now": choose.randint(-(2**31), 2**33)}


KINDS = {"expressions": expression, "statements": statements, "values": values, "dates": date}
