# ruff: noqa: E501 - templates as published have long lines
"""Chat templates with the constructs of the large families, conversations for them, and templates that mean harm."""

from __future__ import annotations

from typing import Any

CHATML = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif -%}
{% for message in messages %}
{{'<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') | trim + '<|im_end|>' + '\\n'}}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}{%- set system_message = messages[0]['content']|trim %}
    {%- else %}{%- set system_message = messages[0]['content'][0]['text']|trim %}{%- endif %}
    {%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {%- if message['content'] is string %}{{- message['content'] | trim }}
        {%- else %}
            {%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}
        {%- endif %}{{- '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("only one tool call at once!") }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
        {%- endif %}{%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- elif message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}{%- set content = message.content %}{%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}{{- '"call_id": "x"}[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if not loop.last %}{{- "}, " }}{%- else %}{{- "}]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}{{- " " + message["content"]|trim + eos_token }}
    {%- else %}{{- raise_exception("Only user and assistant roles are supported!") }}{%- endif %}
{%- endfor %}
"""

DEEPSEEK = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', is_first_sp=true, is_last_user=false) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}
{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{%- set ns.is_last_user = true -%}
{{'<User>' + message['content']}}{%- endif %}
{%- if message['role'] == 'assistant' %}
  {%- if ns.is_last_user %}{{'<Assistant>'}}{% if thinking %}{{'<think>'}}{% else %}{{'</think>'}}{% endif %}{%- endif %}
  {%- set ns.is_last_user = false -%}
  {% set content = message['content'] | default('', true) %}
  {% if '</think>' in content %}{% set content = content.split('</think>', 1)[1] %}{% endif %}
  {%- if message['tool_calls'] is defined and message['tool_calls'] is not none %}
    {%- for tool in message['tool_calls'] %}
      {%- if loop.first %}{{ content + '<calls>' }}{%- endif %}
      {{- tool['function']['name'] + '<sep>' + tool['function']['arguments']|tojson }}
    {%- endfor %}{{ '<calls_end>' + eos_token }}
  {%- else %}{{ content + eos_token }}{%- endif %}
{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{{'<output>' + message['content']|string + '<output_end>'}}
{%- endif %}{%- endfor -%}
{%- if add_generation_prompt and ns.is_last_user and not ns.is_tool %}{{'<Assistant><think>\\n'}}{% endif %}
"""

HARMONY = """\
{%- macro render_type(spec, required) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}{{- render_type(spec['items'], false) + "[]" -}}{%- else -%}any[]{%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type[0] is defined -%}
        {{- spec.type | join(" | ") -}}
    {%- elif spec.type == "object" -%}
        {%- if spec.properties -%}{{- "{\\n" }}
            {%- for name, value in spec.properties.items() -%}
                {{- name -}}{%- if name not in (spec.required or []) -%}{{- "?" -}}{%- endif -%}
                {{- ": " }}{{ render_type(value, true) }}{%- if not loop.last -%}{{- ", " -}}{%- endif -%}
            {%- endfor -%}{{- "}" }}
        {%- else -%}object{%- endif -%}
    {%- elif spec.enum -%}{{- '"' + spec.enum|join('" | "') + '"' -}}
    {%- else -%}{{- spec.type|default("any") -}}{%- endif -%}
{%- endmacro -%}
{%- macro render_tools(namespace_name, tools) -%}
    {{- "## " + namespace_name + "\\n\\n" }}{{- "namespace " + namespace_name + " {\\n\\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}{{- "// " + tool.description + "\\n" }}{{- "type " + tool.name + " = (_: {\\n" }}
        {%- for name, spec in tool.parameters.properties.items() %}
            {{- name + ": " + render_type(spec, false) }}
            {%- if spec.default is defined -%}{{- ", // default: " + spec.default|string }}{%- endif %}{{- "\\n" }}
        {%- endfor %}{{- "}) => any;\\n\\n" }}
    {%- endfor %}{{- "}" }}
{%- endmacro -%}
{%- if model_identity is not defined %}{%- set model_identity = "You are a model." %}{%- endif %}
{{- "<|start|>system<|message|>" + model_identity + "\\nCurrent date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") + "<|end|>" }}
{%- set developer = messages[0].content if messages[0].role in ["developer", "system"] else "" %}
{%- set loop_messages = messages[1:] if messages[0].role in ["developer", "system"] else messages %}
{%- if developer or tools %}
    {{- "<|start|>developer<|message|>" + developer }}
    {%- if tools -%}{{- render_tools("functions", tools) }}{%- endif -%}{{- "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and message.content and "<|channel|>" in message.content %}
            {{- raise_exception("You have passed a message containing <|channel|> tags.") }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set future_final_message = namespace(found=false) %}
            {%- for future_message in loop_messages[loop.index:] %}
                {%- if future_message.role == 'assistant' and "tool_calls" not in future_message %}
                    {%- set future_final_message.found = true %}
                {%- endif %}
            {%- endfor %}
            {%- set tool_call = message.tool_calls[0] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {%- if message.thinking and not future_final_message.found %}
                {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
            {%- endif %}
            {{- "<|start|>assistant to=functions." ~ tool_call.name ~ "<|channel|>commentary json<|message|>" }}
            {{- tool_call.arguments|tojson }}{{- "<|call|>" }}{%- set last_tool_call.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
            {%- set last_tool_call.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if last_tool_call.name is none %}{{- raise_exception("Message has tool role, but no call") }}{%- endif %}
        {{- "<|start|>functions." ~ last_tool_call.name ~ " to=assistant<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""

QWEN = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}{{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
                {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}{{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

FAMILIES = {
    "chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL, "deepseek": DEEPSEEK, "harmony": HARMONY, "qwen": QWEN,
}  # fmt: skip

_EACH = "{% for m in messages %}"
CONSTRUCTS = {
    "break": _EACH + "{{ m.role }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}!",
    "continue": _EACH + "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% else %}none{% endfor %}",
    "generation": _EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tojson": _EACH + "{{ m|tojson }}{{ m|tojson(indent=2, sort_keys=true) }}"
    "{{ m|tojson(ensure_ascii=true, separators=(',', ':')) }}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token is defined }}x",
    "tools": "{{ tools }}{{ tools is none }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
    "documents": "{{ documents }}{% for d in documents or [] %}{{ d.title ~ ':' ~ d['text'] }}{% endfor %}",
    "variables": "{{ enable_thinking }}{{ enable_thinking is defined }}{{ limit|default(3) }}.",
    "namespace": "{% set ns = namespace(s='', n=0) %}" + _EACH + "{% set ns.s = ns.s + m.role %}"
    "{% set ns.n = ns.n + m.content|length %}{% endfor %}{{ ns.s }} {{ ns.n }} {{ ns }}",
    "dict": "{% set d = dict(a=1, b=messages[0].role) %}{{ d }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ d.items()|list }}",
    "macro": "{% macro show(m, n=2) %}[{{ m.role * n }}{{ caller() if caller else '' }}]{% endmacro %}"
    + _EACH + "{{ show(m) }}{% call show(m, n=1) %}in{% endcall %}{% endfor %}",
    "set block": "{% set x %}<{{ messages|length }}>{% endset %}{{ x * 2 }}{% set y | upper %}abc{% endset %}{{ y }}",
    "filter block": "{% filter upper|trim %}  {{ messages[0].content }} {% endfilter %}",
    "recursive": "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}<{{ loop(x) }}>"
    "{% else %}{{ x }}{{ loop.depth }}{% endif %}{% endfor %}",
    "loop": _EACH + "{{ loop.index }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.changed(m.role) }}{{ loop.previtem.role if loop.previtem }}"
    "{{ loop.nextitem.role if loop.nextitem is defined }}{% endfor %}",
    "loop test": "{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }}{{ m.role }}{% endfor %}.",
    "slices": "{{ messages[0].content[::-1] }}{{ messages[1:]|length }}{{ messages[-1].content[1:3] }}"
    "{{ (1, 2, 3)[:2] }}",
    "filters": _EACH + "{{ m.content|upper|trim|replace('a', 'b')|indent(2) }}{{ m.content|capitalize|truncate(9) }}"
    "{{ m.content|title }}{{ m.content|wordcount }}{{ m.content|urlencode }}{{ m.content|e }}{{ m.content|center(9) }}"
    "{{ m.content|list|unique|join(',') }}{{ m.content|list|sort|first }}{{ m.content|reverse|join }}{% endfor %}",
    "selecting": "{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|map('upper')|join('|') }}"
    "{{ messages|rejectattr('role', 'in', ['user', 'tool'])|list|length }}{{ messages|map(attribute='role')|list }}"
    "{{ messages|groupby('role')|map('first')|list }}{{ (messages|last).role }}{{ messages|batch(2)|list|length }}"
    "{{ messages|slice(2)|map('length')|sum }}",
    "methods": _EACH + "{{ m.content.split(' ') }}{{ m.content.strip().splitlines() }}{{ m.get('x', 'no') }}"
    "{{ '-'.join(m.keys()) }}{{ m.content.startswith('a') }}{{ m.content.rpartition(' ') }}{{ m.content.encode() }}"
    "{{ '%s|%-5d|%%' % (m.role, 3) }}{{ '{:>9}|{!r}|{a}'.format(m.role, m.content, a=1) }}"
    "{{ '%s=%s'|format(m.role, 1.5) }}{{ m.content.zfill(9).ljust(12, '.') }}{{ 'a{x}'.format_map(dict(x=2)) }}{% endfor %}",
    "numbers": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ -7 % 3 }}{{ 1.5|round }}{{ '42'|int + 1 }}{{ 3 * 'ab' }}"
    "{{ [1] * 2 + [3] }}{{ 1 < 2 <= 2 }}{{ range(3)|list }}{{ range(1, 9, 2)|sum }}{{ 'x' in 'xyz' }}",
    "concat": _EACH + "{{ loop.index ~ m.role ~ none ~ [1, 'ü'] ~ {'a': 1} ~ undefined_name }}{% endfor %}",
    "autoescape": "{% autoescape true %}<b>{{ messages[0].content }}{{ messages[0].role|safe ~ '<' }}{% endautoescape %}<b>",
    "blocks": "{% block a %}[{{ messages[0].role }}]{% endblock %}{{ self.a() }}{% with x = 3 %}{{ x }}{% endwith %}",
    "conditions": "{{ 'a' if messages|length > 1 }}{{ 'b' if false else 'c' }}{{ not true or false }}"
    "{{ x is undefined }}{{ messages is sequence }}{{ messages[0] is mapping }}{{ none is none }}{{ 3 is odd }}",
    "undefined": "{{ messages[0].nothing }}{{ messages[0]['nothing'] is defined }}{{ missing|default('d') }}.",
    "private": "{{ messages.append(1) }}",
    "raise": _EACH + "{% if m.role == 'tool' %}{{ raise_exception('no ' ~ m.role) }}{% endif %}{% endfor %}ok",
    "whitespace": "  {% if true %}\n   a\n  {%- endif +%}\n\tb {# c #}\n{{- ' d ' -}}\n e\n",
    "cycler": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.current }}{{ c.next() }}{% set j = joiner(',') %}"
    + _EACH + "{{ j() }}{{ m.role }}{% endfor %}",
    "reasoning": _EACH + "{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}.",
}  # fmt: skip

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather at a <place> & time: 'é' \"q\" \u2028 \U0001f327",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["Bern", "Zürich"]},
                    "days": {"type": ["integer", "null"], "default": 1},
                    "tags": {"type": "array", "items": {"type": "string"}},
                    "at": {"type": "object", "properties": {"hour": {"type": "number"}}, "required": ["hour"]},
                },
                "required": ["place"],
            },
        },
    }
]
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2}}}],
}


def conversation(messages: int, nbytes: int) -> list[dict[str, Any]]:
    """A long one: users and an assistant that reasons, with some markup in the text."""
    text = ("Some words, <b>x</b> & \"y\"\n\n* one\n* two; 'z' 3 + 4 = 7.\t" * (1 + nbytes // messages // 50))[
        : nbytes // messages
    ]
    said: list[dict[str, Any]] = []
    for number in range(messages):
        answer = {"role": "assistant", "content": text, "reasoning_content": "because"}
        said.append({"role": "user", "content": text} if number % 2 == 0 else answer)
    return said


_GROW = "{%% set ns = namespace(s=%s) %%}{%% for i in range(200) %%}{%% set ns.s = %s %%}{%% endfor %%}%s"
_MANY = "{%% for a in range(100000) %%}{%% for b in range(100000) %%}%s{%% endfor %%}{%% endfor %%}"
LARGE = [  # refused for what they would make
    "{{ ('a' * 1500000000)|length }} hi",
    "{{ 1500000000 * 'a' }}",
    "{{ ([1] * 1500000000)|length }}",
    "{{ (('a',) * 1500000000)|length }}",
    "{{ ('a'.encode() * 1500000000)|length }}",
    "{{ 'a'|center(1500000000)|length }}",
    "{{ 'a'.center(1500000000)|length }}",
    "{{ 'a'.zfill(1500000000)|length }}",
    "{{ 'a'.ljust(1500000000, 'é')|length }}",
    "{{ 'a'.rjust(1500000000)|length }}",
    "{{ ('\t' * 1000).expandtabs(1500000)|length }}",
    "{{ '%1500000000d' % 1 }}",
    "{{ '%.1500000000f' % 1 }}",
    "{{ '%*d' % (1500000000, 1) }}",
    "{{ '%1500000000s'|format('a') }}",
    "{{ '%(a)1500000000s'|format(a='a') }}",
    "{{ '{:1500000000}'.format(1) }}",
    "{{ '{:.1500000000f}'.format(1.0) }}",
    "{{ '{:{w}}'.format(1, w=1500000000) }}",
    "{{ '{a:{w}}'.format_map(dict(a=1, w=1500000000)) }}",
    "{{ ('{0}' * 10000).format('a' * 100000)|length }}",
    "{{ ('%(a)s' * 10000) % {'a': 'a' * 100000} }}",
    "{{ ('ab' * 100000)|replace('a', 'b' * 100000)|length }}",
    "{{ ('ab' * 100000).replace('a', 'b' * 100000)|length }}",
    "{{ ('ab' * 100000)|replace('', 'b' * 100000)|length }}",
    "{{ (['a'] * 10000)|join('b' * 100000)|length }}",
    "{{ ('b' * 100000).join(['a'] * 10000)|length }}",
    "{{ ('b' * 1000000).join(range(1000)|map('string'))|length }}",
    "{{ ('a\n' * 100000)|indent(100000)|length }}",
    "{{ ('a\n' * 100000)|indent('x' * 100000)|length }}",
    "{{ ('a\n' * 100000)|wordwrap(1, wrapstring='x' * 100000)|length }}",
    "{{ ([1] * 100000)|tojson(indent=100000)|length }}",
    "{{ ([1] * 100000)|tojson(separators=('x' * 100000, ':'))|length }}",
    "{{ [1]|batch(1500000000, 'x')|list|length }}",
    "{{ [1]|slice(1500000000)|list|length }}",
    "{{ (1).to_bytes(1500000000, 'big')|length }}",
    "{{ ('a' * 10000).translate({97: 'x' * 1000000})|length }}",
    "{{ dict.fromkeys(range(100000), 'a' * 1000)|string|length }}",
    "{{ 3 ** 30000000 }}",
    "{{ 1.5|round(30000000, 'ceil') }}",
    "{{ strftime_now('%999999999d' * 100000) }}",
    "{{ ('&' * 8000000)|e|e|e|e|length }}",
    "{{ ('x' * 1500000)|list|map('list')|list|length }}",
    "{% autoescape true %}{% for i in range(1000) %}{{ '&' * 100000 }}{% endfor %}{% endautoescape %}",
    "{{ [['a' * 1000] * 1000] * 1000 }}",
    _GROW % ("'a'", "ns.s ~ ns.s", ""),
    _GROW % ("'a'", "ns.s + ns.s", ""),
    _GROW % ("'a'", "ns.s * 2", ""),
    _GROW % ("[1]", "ns.s + ns.s", ""),
    _GROW % ("'aa'", "ns.s|replace('a', 'aa')", ""),
    _GROW % ("'a'", "[ns.s, ns.s]|join", ""),
    _GROW % ("'a'", "'%s%s'|format(ns.s, ns.s)", ""),
    _GROW % ("'a'", "'{0}{0}'.format(ns.s)", ""),
    _GROW % ("'a'", "ns.s|tojson", ""),
    _GROW % ("[1]", "[ns.s, ns.s]", "{{ ns.s }}"),
    _GROW % ("(1,)", "(ns.s, ns.s)", "{{ {ns.s: 1} }}"),
    _GROW % ("{}", "{'a': ns.s, 'b': ns.s}", "{{ ns.s|tojson }}"),
    _GROW % ("[1]", "ns.s|batch(1)|list + ns.s|batch(1)|list", "{{ ns.s|string|length }}"),
    _GROW % ("1", "namespace(a=ns.s, b=ns.s)", "{{ ns.s }}"),
    _GROW % ("10 ** 300", "ns.s * ns.s", ""),
    "{% for a in range(100000) %}{% for b in range(1000) %}some words{% endfor %}{% endfor %}",
    "{% macro f() %}{% for i in range(10000) %}0123456789{% endfor %}{% endmacro %}{% for i in range(10000) %}{{ f() }}{% endfor %}",
    "{% set x %}{% for i in range(10000) %}{% for j in range(10000) %}01234567890123456789{% endfor %}{% endfor %}{% endset %}x",
]
LONG = [  # refused for the steps that they would take
    _MANY % "",
    _MANY % "{% set x = a * b %}",
    _MANY % "{% if a == b %}{% endif %}",
    _MANY % "{% if a is odd and a.b is undefined %}{% endif %}",
    _MANY % "{% set x = a|string|upper|trim %}",
    _MANY % "{% set x = [a, b] %}",
    _MANY % "{% set x = strftime_now('%c') %}",
    _MANY % "{% set x = 'a b'|urlize %}",
    _MANY % "{% continue %}",
    "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|list %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|map('abs')|sum %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|select('odd')|list|length %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|sort|first %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = range(100000)|unique|list|last %}{% endfor %}",
    "{% for a in range(100000) %}{% set x = a in range(100000)|list %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[[1] * 1000] * 1000] * 1000 recursive %}{{ loop(x) if x is iterable }}{% endfor %}",
    "{% set a = 'x' * 1000000 %}{% set b = 'x' * 999999 ~ 'x' %}{% for i in range(100000) %}{% if a == b %}{% endif %}{% endfor %}",
    "{% set a = 'x' * 1000000 %}{% for i in range(100000) %}{% if 'y' in a %}{% endif %}{% endfor %}",
    "{% set a = 'x' * 1000000 %}{% for i in range(100000) %}{% set y = a.count('y') %}{% endfor %}",
    "{{ ('x' * 1000000).rfind('y' ~ 'x' * 100000) }}",
    "{{ ('x' * 1000000)|wordwrap(1)|length }}",
    "{{ ('<!--' * 500000)|striptags|length }}",
    "{{ ('a@' * 500000)|urlize|length }}",
    "{{ ('é' * 1000000).encode('punycode')|length }}",
    "{{ (['x' * 1000, 'x' * 999 ~ 'x'] * 4000)|sort|length }}",
    "{{ ([[1]] * 100000)|sum(start=[])|length }}",
    "{{ ([1] * 100000)|pprint|length }}",
]
BROKEN = [  # mistakes, each with an error of its own in Python or jinja
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{{ 1 / 0 }}",
    "{{ 1 % 0 }}",
    "{{ 1 + 'a' }}",
    "{{ messages + 1 }}",
    "{{ messages.nothing.more }}",
    "{{ dict([1]) }}",
    "{{ {}|tojson(indent={}) }}",
    "{{ namespace|tojson }}",
    "{{ 10.0 ** 1000 }}",
    "{{ ('9' * 5000)|int ** 1 }}{{ '%d' % 'a' }}",
    "{{ '{'.format(1) }}",
    "{{ '{a}'.format(1) }}",
    "{{ '%s %s' % 1 }}",
    "{{ [{'a': 1}, {}]|sort|first }}",
    "{{ messages|first|first|first|first + 1 }}",
    "{{ strftime_now(1) }}",
    "{{ strftime_now('\ud800') }}",
    "{{ '\ud800' }}",
    "{{ range(1000000) }}",
    "{{ range(10 ** 30) }}",
    "{{ namespace(_a=1) }}",
    "{{ messages.append(1)() }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__'].mro() }}",
    "{{ messages|attr('__class__')|attr('mro')() }}",
    "{{ ('%s' % messages).format.__globals__.x }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(dict) }}{{ 1 / 0 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception('') }}",
    "{% if %}",
    "{{ x",
    "{% nothing %}",
    "{{ 'a'|nothing }}",
    "{{ 1 is nothing }}",
    "{% break %}",
    "{{ lipsum(1) }}",
    "",
    "{% if false %}a{% endif %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ " + "[" * 500 + "]" * 500 + " }}",
    "{% for a in b %}" * 100 + "{% endfor %}" * 100,
    "{{ " + "9" * 5000 + " }}",
    "{{ 1e999 }}",
    "{{ a }}" * 21000,
    "{% set ns = namespace(s=[]) %}{% for i in range(1000) %}{% set ns.s = [ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=()) %}{% for i in range(100000) %}{% set ns.s = (ns.s, 1) %}{% endfor %}{{ {ns.s: 1}|length }}",
]
