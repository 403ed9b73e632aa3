"""Tokenizer files in all their states: the tokens of a prompt are transformers', plain and as a chat, or a refusal."""

from __future__ import annotations

import json
import shutil
from random import Random
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.cases import HEAVY_BYTES, Case, Compare, Step, command
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds
from tests.fuzz.zygote import Order

_TOKENS = 5
_FAMILY = "mixtral"
_WORDS = (
    "once",
    "upon a time",
    " ",
    "  two",
    "\n",
    "\n\n",
    "<s>",
    "</s>",
    "<new>",
    "<|im_start|>",
    "é",
    "\u4f60\u597d",
    "\U0001f600",
    "Don't",
    "x1234",
    "\t",
    "HELLO",
    "<unk>",
    "\u00a0",
    "e\u0301",
    "...",
    "the<new>red",
    " </s> ",
    "[INST]",
    "\u200d",
    "'s",
)
_HEAD = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
_TEMPLATES = (
    _HEAD,
    "{{ bos_token }}" + _HEAD,
    "{{ strftime_now('%Y') }}" + _HEAD,
    "{{ eos_token }}{{ pad_token }}" + _HEAD,
    "{{ messages|tojson }}",
    "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% if tools %}T{% endif %}{% if documents %}D{% endif %}" + _HEAD,
    "{% if tools is defined %}X{% endif %}" + _HEAD,
    "{% if enable_thinking is defined %}T{% endif %}" + _HEAD,
    "{% if add_generation_prompt %}G{% endif %}" + _HEAD,
    "  {% if true %}\n  x\n  {% endif %}\n" + _HEAD,
    "{{ unk_token }}" + _HEAD,
    "{{ raise_exception('no') }}",
    "{{ {'a': '<é>', 'b': [1]}|tojson(indent=2) }}" + _HEAD,
    "{{ messages[0]['content'].strip()|upper }}",
    "<s>{{ messages[0].content }}</s>",
    "{{ additional_special_tokens }}" + _HEAD,
    "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}{{ ns.s }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[0].content) }}",
    "{{ messages[0].content is string }}{{ messages[0].get('name', 'none') }}",
    "{{ messages[0].content.split()|join('-') }}",
    "{{- '' -}} x {%- if 1 -%} y {%- endif %} z\n",
)
_TOKEN: dict[str, Any] = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
_SETTINGS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("add_bos_token", (True, False, None, 1)),
    ("add_eos_token", (True, False)),
    ("add_prefix_space", (True, False, None)),
    ("legacy", (True, False)),
    (
        "bos_token",
        (
            "<s>",
            None,
            "<new>",
            {"content": "<s>", **_TOKEN},
            {"__type": "AddedToken", "content": "<s>", **_TOKEN},
            5,
            "",
        ),
    ),
    ("eos_token", ("</s>", None, "<new>", "the", {"content": "</s>"})),
    ("pad_token", ("</s>", "<pad>", None, "<s>")),
    ("unk_token", ("<unk>", None, "<s>")),
    ("model_max_length", (4, 256, 10**30, 1e30, 0, -1, None, "x")),
    ("padding_side", ("left", "right", "x")),
    ("truncation_side", ("left", "x")),
    (
        "tokenizer_class",
        (
            "PreTrainedTokenizerFast",
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "GPT2Tokenizer",
            "GPT2TokenizerFast",
            "Qwen2Tokenizer",
            "Qwen2TokenizerFast",
            "TokenizersBackend",
            "Nonsense",
            None,
            5,
            "GemmaTokenizer",
            "T5Tokenizer",
            "CohereTokenizer",
            "BertTokenizer",
        ),
    ),
    (
        "added_tokens_decoder",
        (
            {"300": {"content": "<new>", **_TOKEN}},
            {"5": {"content": "<new>", **_TOKEN}},
            {"320": {"content": "<new>", **_TOKEN, "special": False}},
            {"321": {"content": "<|im_start|>", **_TOKEN, "lstrip": True, "rstrip": True}},
            {"100000": {"content": "<new>", **_TOKEN}},
            {"x": {}},
            {},
            [],
            {"0": {"content": "<s>", **_TOKEN, "normalized": True}},
            {"0": {"content": "<other>", **_TOKEN}},
        ),
    ),
    ("additional_special_tokens", (["<new>"], ["<|im_start|>", "<new>"], [], ["the"], [5], None, "x")),
    ("extra_special_tokens", ({"image_token": "<image>"}, ["<new>"], {}, None)),
    ("clean_up_tokenization_spaces", (True, False)),
    ("split_special_tokens", (True, False)),
    ("chat_template", _TEMPLATES),
    ("chat_template", _TEMPLATES),
    ("chat_template", _TEMPLATES),
    (
        "chat_template",
        (
            [{"name": "default", "template": _HEAD}, {"name": "tool", "template": "x"}],
            [{"name": "tool", "template": _HEAD}],
            [5],
            [{}],
            {},
            5,
            "",
            [],
            {"default": _HEAD},
        ),
    ),
    ("use_default_system_prompt", (True, False)),
    ("spaces_between_special_tokens", (False,)),
    ("sp_model_kwargs", ({}, {"enable_sampling": True})),
    ("do_lower_case", (True,)),
    ("max_length", (4,)),
    ("stride", (2,)),
    ("truncation", (True,)),
    ("padding", (True, "max_length")),
    ("auto_map", ({"AutoTokenizer": ["x.Y", None]},)),
    ("backend", ("tokenizers", "x")),
    ("is_local", (True,)),
    ("model_input_names", (["input_ids"], ["x"], 5)),
    ("processor_class", ("X",)),
)


def make(random: Random, place: Place, seeds: Seeds) -> Case:
    """Tokenizer files at cwd/c, and a bundle at cwd/b that gets them the way an export writes them."""
    checkpoint = place.cwd / "c"
    shutil.copytree(seeds.checkpoint(_FAMILY), checkpoint)
    shutil.copytree(seeds.bundle(_FAMILY), place.cwd / "b")
    path = checkpoint / "tokenizer_config.json"
    document = json.loads(path.read_text())
    jinja = checkpoint / "chat_template.jinja"
    if random.random() < 0.6:
        document["chat_template"] = jinja.read_text()
        jinja.unlink()
    data, what = mutate_settings(random, document)
    path.write_bytes(data)
    if random.random() < 0.15:
        other = random.choice(
            [
                ("special_tokens_map.json", {"eos_token": "</s>", "additional_special_tokens": ["<new>"]}),
                ("added_tokens.json", {"<new>": 310}),
                ("special_tokens_map.json", {"bos_token": {"content": "<s>"}, "pad_token": "<pad>"}),
                ("chat_template.jinja", random.choice(_TEMPLATES)),
            ]
        )
        (checkpoint / other[0]).write_text(other[1] if isinstance(other[1], str) else json.dumps(other[1]))
        what += f"; {other[0]}: {mutate.shown(other[1])}"
    text = "".join(random.choice(_WORDS) for _ in range(random.randrange(1, 6)))
    prompts = ({"text": text, "chat": False}, {"text": text, "chat": True})
    write = Order("tests.fuzz.tasks:retokenize", ("c", "b"), HEAVY_BYTES, heavy=True)
    runs = [_run(prompt) for prompt in prompts]
    return Case("tokenizer", what, (Step(write, writes=("b",)), *runs), compare=Compare("c", prompts, _TOKENS))


def _run(prompt: dict[str, Any]) -> Step:
    raw = [] if prompt["chat"] else ["--raw"]
    return Step(command("run", "b", f"--prompt={prompt['text']}", "--max-tokens", _TOKENS, "--json", *raw))


def mutate_settings(random: Random, document: dict[str, Any]) -> tuple[bytes, str]:
    if random.random() < 0.04:
        return mutate.raw(random, mutate.json_bytes(document))
    notes = []
    for _ in range(random.choice([1, 1, 2, 3])):
        if random.random() < 0.75:
            name, values = random.choice(_SETTINGS)
            document[name] = random.choice(values)
            notes.append(f"{name} = {mutate.shown(document[name])}")
        else:
            document, note = mutate.edit(random, document)
            notes.append(note)
    return mutate.json_bytes(document), "; ".join(notes)
