"""Templates of our own in each family's documented form of answers: one assistant's message after the prompt."""

from __future__ import annotations

_HERMES = """
{%- if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls %}
{%- if message.content or not loop.first %}
{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}"""

_QWEN_CODER = """{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items -%}
<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor -%}
</function>
</tool_call>
{%- endfor %}"""

_MISTRAL_LIST = """{{ message.content }}{% if message.tool_calls %}[TOOL_CALLS] [
{%- for call in message.tool_calls -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}
{%- if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"""

_MISTRAL_NAMES = """
{%- if message.reasoning_content %}[THINK]{{ message.reasoning_content }}[/THINK]{% endif %}{{ message.content }}
{%- for call in message.tool_calls -%}
[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}"""

_HARMONY = """
{%- if message.reasoning_content %}<|channel|>analysis<|message|>
{{- message.reasoning_content }}<|end|><|start|>assistant
{%- endif %}
{%- if message.content %}<|channel|>{{ 'commentary' if message.tool_calls else 'final' }}<|message|>
{{- message.content }}
{%- if message.tool_calls %}<|end|><|start|>assistant{% endif %}{% endif %}
{%- for call in message.tool_calls -%}
<|channel|>commentary to=functions.{{ call.function.name }} <|constrain|>json<|message|>
{{- call.function.arguments | tojson }}<|call|>
{%- if not loop.last %}<|start|>assistant{% endif %}{% endfor %}"""

_DEEPSEEK_V3 = """{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% if message.tool_calls %}<｜tool▁calls▁begin｜>
{%- for call in message.tool_calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.function.name }}
```json
{{ call.function.arguments }}
```<｜tool▁call▁end｜>{% if not loop.last %}
{% endif %}{% endfor %}<｜tool▁calls▁end｜>{% endif %}"""

_DEEPSEEK_V31 = """{{ message.content }}{% if message.tool_calls %}<｜tool▁calls▁begin｜>
{%- for call in message.tool_calls -%}
<｜tool▁call▁begin｜>{{ call.function.name }}<｜tool▁sep｜>{{ call.function.arguments }}<｜tool▁call▁end｜>
{%- endfor %}<｜tool▁calls▁end｜>{% endif %}"""

_GLM = """{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{ message.content }}
{%- for call in message.tool_calls %}
<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments | items -%}
<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}</tool_call>
{%- endfor %}"""

_LLAMA3 = """{% if tools %}{# "parameters": #}{% endif %}{{ message.content }}
{%- for call in message.tool_calls -%}
{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments | tojson }}}
{%- if not loop.last %}; {% endif %}{% endfor %}"""

_LLAMA4 = """{% if tools %}{# <|python_start|> #}{% endif %}{{ message.content }}
{%- if message.tool_calls %}[{% for call in message.tool_calls -%}
{{ call.function.name }}({% for key, value in call.function.arguments | items -%}
{{ key }}={{ value | tojson }}{% if not loop.last %}, {% endif %}{% endfor %})
{%- if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"""

_LFM = (
    _LLAMA4.replace("<|python_start|>", "<|tool_call_start|>")
    .replace("[{%", "<|tool_call_start|>[{%")
    .replace("]{% endif %}", "]<|tool_call_end|>{% endif %}")
)

_KIMI = """{{ message.content }}{% if message.tool_calls %}<|tool_calls_section_begin|>
{%- for call in message.tool_calls -%}
<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>{{ call.function.arguments | tojson }}<|tool_call_end|>
{%- endfor %}<|tool_calls_section_end|>{% endif %}"""

_MINIMAX = """{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}{% if message.tool_calls %}
<minimax:tool_call>
{% for call in message.tool_calls -%}
<invoke name="{{ call.function.name }}">
{% for key, value in call.function.arguments | items -%}
<parameter name="{{ key }}">{{ value if value is string else value | tojson }}</parameter>
{% endfor %}</invoke>
{% endfor %}</minimax:tool_call>{% endif %}"""

_LIST = """{{ message.content }}{% if message.tool_calls %}OPEN[
{%- for call in message.tool_calls -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- if not loop.last %}, {% endif %}{% endfor %}]CLOSE{% endif %}"""

TEMPLATES: dict[str, str] = {
    "hermes": _HERMES,
    "qwen-coder": _QWEN_CODER,
    "mistral": _MISTRAL_LIST,
    "mistral-names": _MISTRAL_NAMES,
    "harmony": _HARMONY,
    "deepseek": _DEEPSEEK_V3,
    "deepseek-v31": _DEEPSEEK_V31,
    "glm": _GLM,
    "llama3": _LLAMA3,
    "llama4": _LLAMA4,
    "lfm": _LFM,
    "kimi": _KIMI,
    "minimax": _MINIMAX,
    "granite": _LIST.replace("OPEN", "<|tool_call|>").replace("CLOSE", ""),
    "nemotron": _LIST.replace("OPEN", "<TOOLCALL>").replace("CLOSE", "</TOOLCALL>"),
    "json-lines": _LIST.replace("OPEN", "<tool_calls>").replace("CLOSE", "</tool_calls>"),
}
WITHOUT_CONTENT = {"llama3", "llama4"}  # a call is the whole answer
WITH_IDS = {"mistral", "mistral-names", "kimi"}
