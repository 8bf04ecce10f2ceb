"""No template of a conversation takes more time or memory than it may."""

import json
import resource
import time

import jinja2
import pytest

from mixcpt_jax.models import template_sandbox
from mixcpt_jax.models.template_sandbox import OverBudget, Template

MESSAGES = [
    {"role": "user", "content": "What is a mesh?"},
    {"role": "assistant", "content": "Devices in a grid."},
] * 3

LOOP = "{% for i in range(99999) %}BODY{% endfor %}"
BOMBS = {
    "repeated text": "{{ 'a' * 10**9 }}",
    "text repeated by": "{{ 10**9 * 'a' }}",
    "repeated list": "{{ ([0] * 10**9)|length }}",
    "repeated tuple": "{{ ((0,) * 10**9)|length }}",
    "power": "{{ 2**(2**33) }}",
    "power of a variable": "{% set x = 2 %}{{ x**(x**40) > 1 }}",
    "squares": "{% set n = namespace(x=9**99) %}"
    + LOOP.replace("BODY", "{% set n.x = n.x * n.x %}"),
    "doubled text": "{% set n = namespace(x='ab') %}"
    + LOOP.replace("BODY", "{% set n.x = n.x ~ n.x %}"),
    "added text": "{% set n = namespace(x='ab') %}"
    + LOOP.replace("BODY", "{% set n.x = n.x + n.x %}"),
    "doubled list": "{% set n = namespace(x=[1]) %}"
    + LOOP.replace("BODY", "{% set n.x = n.x + n.x %}"),
    "nested list": "{% set n = namespace(x=[1]) %}"
    + LOOP.replace("BODY", "{% set n.x = [n.x, n.x] %}")
    + "{{ n.x }}",
    "nested tuple": "{% set n = namespace(x=(1,)) %}"
    + LOOP.replace("BODY", "{% set n.x = (n.x, n.x) %}"),
    "nested dict": "{% set n = namespace(x={}) %}"
    + LOOP.replace("BODY", "{% set n.x = dict(a=n.x, b=n.x) %}"),
    "nested loops": LOOP.replace("BODY", LOOP.replace("BODY", "")),
    "loops over text": "{% for i in 'a' * 10**6 %}{% for j in 'a' * 10**6 %}"
    "{% endfor %}{% endfor %}",
    "long output": LOOP.replace("BODY", "a" * 10_000),
    "long block": "{% set x %}" + LOOP.replace("BODY", "a" * 10_000) + "{% endset %}",
    "long macro": "{% macro m() %}"
    + LOOP.replace("BODY", "a" * 10_000)
    + "{% endmacro %}{{ m() }}",
    "doubling macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}a{% endmacro %}{{ m(60) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "caller": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 18
    + LOOP.replace("BODY", "aaa")
    + "{% endcall %}" * 18,
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "rjust": "{{ 'a'.rjust(10**9) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "tabs": "{{ '\t'.expandtabs(10**9) }}",
    "many tabs": "{{ ('\t' * 10**6).expandtabs(9000)|length }}",
    "replace": "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
    "replace nothing": "{{ ('a' * 10**6).replace('', 'b' * 10**6) }}",
    "join": "{{ ('b' * 10**6).join('a' * 10**6) }}",
    "joined items": "{{ ('b' * 10**6).join(range(99999)|map('string')) }}",
    "translate": "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) }}",
    "bytes": "{{ 'a'.encode().ljust(10**9) }}",
    "bytes of an integer": "{{ (1).to_bytes(10**9, 'big') }}",
    "bytes by keyword": "{{ (1).to_bytes(length=10**9, byteorder='big') }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a variable": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format map": "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent of a variable": "{{ '%*d' % (10**9, 1) }}",
    "digits": "{{ '%.1000000000f' % 1 }}",
    "filter format": "{{ '%1000000000d'|format(1) }}",
    "filter center": "{{ 'a'|center(10**9) }}",
    "filter indent": "{{ 'a\nb'|indent(10**9, true) }}",
    "filter indent by text": "{{ ('a\n' * 10**6)|indent('b' * 10**6) }}",
    "filter replace": "{{ ('a' * 10**6)|replace('a', 'b' * 10**6) }}",
    "filter join": "{{ ('a' * 10**6)|join('b' * 10**6) }}",
    "filter batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "filter slice": "{{ [1]|slice(10**9)|list }}",
    "filter tojson": "{{ [[1] * 9999] * 9999|tojson(indent=10**9) }}",
    "filter round": "{{ 1.5|round(10**9) }}",
    "filter sum": "{{ ([[1] * 9999] * 9999)|sum(start=[]) }}",
    "filter wordwrap": "{{ ('a ' * 10**7)|wordwrap(1, wrapstring='b' * 10**6) }}",
    "filter urlize": "{{ ('http://' * 10**6)|urlize }}",
    "mapped filter": "{{ (['a'] * 999)|map('center', 10**9)|list }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "a format of time": "{{ strftime_now('%c' * 10**7) }}",
    "deep expression": "{{ " + "(" * 10**5 + "1" + ")" * 10**5 + " }}",
    "deep blocks": "{% if 1 %}" * 10**4 + "{% endif %}" * 10**4,
    "slices": "{% set x = 'a' * 10**7 %}" + LOOP.replace("BODY", "{% set y = x[1:] %}"),
    "filters of long text": "{% set x = 'a' * 10**7 %}"
    + LOOP.replace("BODY", "{% set y = x|upper %}"),
    "methods of long text": "{% set x = 'a' * 10**7 %}"
    + LOOP.replace("BODY", "{% set y = x.upper() %}"),
    "a long template": "a" * 10**7,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly_in_little_memory(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_OPERATIONS", 2**17)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises((jinja2.TemplateError, RecursionError, OverflowError)):
        Template(BOMBS[name]).render(messages=MESSAGES)
    # A second at most; without a budget they would take hours.
    assert time.thread_time() - start < 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**20  # KiB


def test_template_that_went_over_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_OPERATIONS", 2**17)
    template = Template("{% if messages %}" + BOMBS["nested loops"] + "{% endif %}")
    assert template.render(messages=[]) == ""
    for _ in range(2):
        with pytest.raises(OverBudget, match="operations"):
            template.render(messages=MESSAGES)
    monkeypatch.setattr(template._template, "render", pytest.fail)
    with pytest.raises(OverBudget, match="operations"):
        template.render(messages=[])


def test_what_templates_use_renders_as_in_jinja():
    source = """
{%- macro turn(m) -%}<|{{ m.role|upper }}|>{{ caller() if caller }}{%- endmacro -%}
{%- set ns = namespace(text='', seen=[]) -%}
{%- for m in messages if m.role != 'system' -%}
  {%- call turn(m) -%}{{ m['content'].strip().replace('.', '!') }}{%- endcall -%}
  {%- set ns.text = ns.text ~ loop.index ~ '/' ~ loop.length -%}
  {%- set ns.seen = ns.seen + [m.role] -%}
  {%- if loop.last %}{{ loop.previtem.role }}{% endif -%}
{%- endfor -%}
{{ ns.text }}{{ ns.seen|unique|join(',') }}{{ messages[1:]|length }}
{{ {'a': [1, 2.5, none], 'b': 'ü'}|tojson(indent=2) }}
{{ '%05d %s' % (7, 'x') }}{{ '{:>5}|{}'.format(3, 'y') }}{{ 'a,b'.split(',')[-1] }}
{{ messages|map(attribute='role')|list }}{{ messages|selectattr('role', 'equalto', 'user')
|list|length }}{{ 'a\nb'|indent(2) }}{{ messages[::-1][0].content|trim|truncate(5) }}
{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ 2**10 }}{{ 7 // 2 }}
{% generation %}{{ missing is defined }}{% endgeneration %}
{% for x in missing %}{% endfor %}
"""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain = source.replace("endgeneration", "endif").replace("generation", "if true")
    plain = plain.replace("'b': 'ü'}|tojson(indent=2)", "'b': 'ü'}|dumps")
    environment.filters["dumps"] = lambda v: json.dumps(v, ensure_ascii=False, indent=2)
    expected = environment.from_string(plain).render(messages=MESSAGES)
    assert Template(source).render(messages=MESSAGES) == expected


def test_long_conversations_are_within_bounds(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 600.0)
    turns = [{"role": "user", "content": "word " * 200}] * 20_000
    template = Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content.strip() + '\n' }}"
        "{% endfor %}"
    )
    assert len(template.render(messages=turns)) == 20_000 * (999 + 9)
