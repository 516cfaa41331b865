#!/usr/bin/env python3
"""Writes chat-cases.json: conversations as Python's jinja2 renders them, set up as transformers does.

Needs jinja2 (made with 3.1.6). Run in this directory.
"""
import json
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message):
        raise TemplateError(message)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


HI = {"role": "user", "content": "Hi"}
WEATHER = {"role": "user", "content": "Weather in Zürich and \"Bern\"?"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "it's <now> & here", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": []}}, "required": ["city"]}}}]
CONVERSATIONS = {
    "one question": [HI],
    "system": [{"role": "system", "content": "Be brief."}, HI],
    "two systems": [{"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}, HI],
    "turns": [HI, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "再加一？\n"}],
    "thought": [HI, {"role": "assistant", "content": "<think>\na</think>b</think>\n\nHello!"}, HI],
    "tool calls": [WEATHER, {"role": "assistant", "content": None, "tool_calls": [
        call("weather", '{"city": "Zürich"}'), call("weather", '{"city": "Bern"}')]},
        {"role": "tool", "content": "21°"}, {"role": "tool", "content": "19°"}],
    "after the tools": [WEATHER, {"role": "assistant", "content": None, "tool_calls": [call("weather", "{}")]},
        {"role": "tool", "content": "21°"}, {"role": "assistant", "content": "Warm."}, HI],
    "no message": [],
}

# What Python templates do: methods, slices, namespaces, tests, filters, loop variables, white space.
PYTHON = {
    "methods": "{{ ' a b '.strip() }}|{{ 'xxa'.lstrip('x') }}|{{ 'a,b,c'.split(',')[-1] }}|{{ 'a,b,c'.split(',', 1)[1] }}|"
        "{{ ' a  b '.split() | join('-') }}|{{ 'Ab'.upper() }}{{ 'Ab'.lower() }}|{{ 'abc'.startswith('ab') }}|"
        "{{ 'a-b'.replace('-', '+') }}|{{ 'aXbX'.rstrip('X') }}|{{ 'title case'.title() }}|{{ 'abc'.endswith(('x', 'c')) }}",
    "slices": "{{ messages[1:] | length }}|{{ messages[-1]['role'] }}|{{ messages[::-1][0].role }}|{{ 'hello'[1:3] }}|{{ 'hello'[:-1] }}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.last = m['role'] %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{% if not loop.last %},{% endif %}{% endfor %}"
        "{% for m in messages if m.role == 'user' %}{{ m.content | trim }};{% else %}nobody{% endfor %}",
    "break": "{% for i in range(10) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "tests": "{{ tools is none }}|{{ tools is defined }}|{{ nothing is defined }}|{{ messages is iterable }}|{{ 'a' is string }}|"
        "{{ messages[0] is mapping }}|{{ 1 is number }}|{{ 'a' in 'cab' }}|{{ 'x' not in {'y': 1} }}|{{ true }}|{{ none }}|{{ nothing }}|",
    "dictionaries": "{% for k, v in {'a': 1, 'b': [2]}.items() %}{{ k }}={{ v | tojson }};{% endfor %}{{ {'a': 1}.get('b', 7) }}{{ {'a': 1}['a'] }}",
    "tojson": "{{ tools | tojson }}\n{{ tools | tojson(indent=2) }}\n{{ {'b': [], 'a': {}, 'c': 'é<&>\\'\\u2028\"\\n'} | tojson(sort_keys=true, indent=4) }}|"
        "{{ [1, 2.5, none, true] | tojson(separators=(',', ':')) }}",
    "white space": "  {% if true %}\n  kept {# gone #}\n  {%- set x = 1 %}\n    {% endif %}\nlast\n\n",
    "macro": "{% macro say(m, end='.') %}[{{ m.role }}{{ end }}]{% endmacro %}{% for m in messages %}{{ say(m, end='!') }}{% endfor %}",
    "expressions": "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 3 }}{{ 'a' ~ 1 }}{{ 'yes' if messages else 'no' }}{{ (1, 2)[1] }}{{ 'ab' * 2 }}{{ not false }}",
    "refusal": "{% if messages[0].role == 'user' %}{{ raise_exception('system first') }}{% endif %}",
    "filters": "{{ ['b', 'a'] | sort | join(', ') }}|{{ messages | map(attribute='role') | join('+') }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|"
        "{{ 'a\nb' | indent(2) }}|{{ '' | default('d', true) }}|{{ '5' | int + 1 }}|{{ [1, 2] | first }}{{ [1, 2] | last }}|{{ 'AbC' | lower }}|{{ 'x' | string | length }}",
}


def render(template, messages, tools, prompt, **more):
    try:
        return {"rendered": environment().from_string(template).render(
            messages=messages, tools=tools, documents=None, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS, **more)}
    except TemplateError as e:
        return {"error": str(e)}


def main():
    cases = []
    for model in ("deepseek-v3", "deepseek-r1"):
        template = json.load(open(f"{model}-config.json"))["chat_template"]
        for name, messages in CONVERSATIONS.items():
            for prompt in (False, True):
                cases.append({"name": f"{model}: {name}", "model": model, "messages": messages, "tools": None,
                              "add_generation_prompt": prompt, **render(template, messages, None, prompt)})
    for name, template in PYTHON.items():
        messages = CONVERSATIONS["turns"]
        tools = TOOLS if name == "tojson" else None
        cases.append({"name": name, "template": template, "messages": messages, "tools": tools,
                      "add_generation_prompt": True, **render(template, messages, tools, True)})
    with open("chat-cases.json", "w") as file:
        json.dump(cases, file, ensure_ascii=False, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
