"""Checkpoints as strangers publish or damage them: shards, index, names, dtypes, cards, links, leftovers."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz import hostile, mutate
from tests.fuzz.bundles import replace
from tests.fuzz.cases import Case, Step, command
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds

_FAMILIES = ("mixtral", "mixtral", "qwen3_moe", "qwen3_moe", "deepseek_v3")  # an export takes seconds a layer
_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 123456\n"
_DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F8_E8M0",
    "F4",
    "C64",
    "X",
    "",
)
_METHODS = (
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "fp8", "weight_block_size": [16, 16]},
    {"quant_method": "fp8", "weight_block_size": [0, 0]},
    {"quant_method": "fp8", "weight_block_size": "x"},
    {"quant_method": "modelopt", "quant_algo": "FP8"},
    {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    {"quant_method": "fbgemm_fp8"},
    {"quant_method": "mxfp4"},
    {"quant_method": "hqq"},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "g": {"weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [16, 16]}}
        },
    },
    {"quant_method": "compressed-tensors", "config_groups": []},
    {"quant_method": 5},
    {"quant_method": None},
    {},
    [],
    "x",
    None,
    {"quant_method": "x" * 10_000},
    {"quant_method": "\x1b[31m"},
)


def make(random: Random, place: Place, seeds: Seeds) -> Case:
    """One mutated checkpoint at cwd/c, exported (or planned for)."""
    family = random.choice(_FAMILIES)
    checkpoint = place.cwd / "c"
    shutil.copytree(seeds.checkpoint(family), checkpoint)
    kind = random.choices([*_KINDS], weights=[weight for weight, _ in _KINDS.values()])[0]
    what = _KINDS[kind][1](random, checkpoint, place)
    if kind in {"config", "sizes"} and random.random() < 0.3:
        step = Step(command("plan", "c", "--device", "pi5-8gb", *random.choice([[], ["--json"]])))
        return Case(kind, f"{family}: plan: {what}", (step,))
    scheme = random.choice([[], [], [], ["--scheme", "int4"]])
    steps = [Step(command("export", "c", "-o", "b", *scheme, heavy=True), writes=("b",))]
    if random.random() < 0.3:
        steps.append(Step(command("run", "b", "--prompt", "once", "--max-tokens", 2)))
    return Case(kind, f"{family}: {what}", tuple(steps))


def _edit_json(random: Random, path: Path, under: tuple[tuple[Any, ...], ...] = ((),)) -> str:
    if random.random() < 0.15:
        data, what = mutate.raw(random, path.read_bytes())
    else:
        document, what = mutate.edit(random, json.loads(path.read_text()), under)
        data = mutate.json_bytes(document)
    path.write_bytes(data)
    return f"{path.name}: {what}"


def _config(random: Random, root: Path, place: Place) -> str:
    return _edit_json(random, root / "config.json")


def _sizes(random: Random, root: Path, place: Place) -> str:
    path = root / "config.json"
    config = json.loads(path.read_text())
    numbers = [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)]
    name = random.choice([n for n in numbers if n.startswith(("num_", "n_")) or "size" in n] or numbers)
    config[name] = random.choice([-1, 0, 10**4, 10**6, 10**7, 10**9, 2**53, 10**40, -(10**9)])
    path.write_text(json.dumps(config))
    return f"{name} = {config[name]}"


def _shard(random: Random, root: Path, place: Place) -> str:
    path = root / "model.safetensors"
    data, what = mutate.raw(random, path.read_bytes())
    path.write_bytes(data)
    return f"shard: {what}"


def _header(random: Random, root: Path, place: Place) -> str:
    """The JSON of a shard's header: names, dtypes, shapes, places, its length."""
    path = root / "model.safetensors"
    header, body = read_shard(path)
    name = random.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    match random.randrange(6):
        case 0:
            entry["dtype"] = random.choice(_DTYPES)
            what = f"{name} is {entry['dtype']!r}"
        case 1:
            header, what = mutate.edit(random, header, ((name,),))
        case 2:
            entry["shape"] = random.choice(
                [[2**31], [2**62, 4], [0], [-1], entry["shape"][::-1], [1, *entry["shape"]], [], entry["shape"][:-1]]
            )
            what = f"{name} has shape {entry['shape']}"
        case 3:
            entry["data_offsets"] = random.choice([[0, 0], [-1, 5], [0, 2**63], [0, 4], entry["data_offsets"][::-1]])
            what = f"{name} at {entry['data_offsets']}"
        case 4:
            header["__metadata__"] = random.choice(
                [None, {}, {"format": "np"}, {"format": 5}, {"x": "y" * 100_000}, []]
            )
            what = f"metadata {mutate.shown(header['__metadata__'])}"
        case _:
            text = mutate.json_bytes(header)
            length = random.choice([0, 1, len(text) - 1, len(text) + 10**6, 2**63, 2**64 - 1])
            path.write_bytes(struct.pack("<Q", length) + text + body)
            return f"header of {length} bytes"
    try:
        text = mutate.json_bytes(header)
    except RecursionError:
        text = b"{}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return what


def read_shard(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_shard(path: Path, header: dict[str, Any], body: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def _dtypes(random: Random, root: Path, place: Place) -> str:
    """Tensors that are truly stored in another type: integers where floats belong, eight-bit floats without scales."""
    path = root / "model.safetensors"
    header, body = read_shard(path)
    names = [n for n in header if n != "__metadata__"]
    part = random.choice(["experts", "embed", "q_proj", "norm", "gate", ""])
    chosen = [n for n in names if part in n] or names
    chosen = random.choice([chosen, chosen[:1], chosen[-1:]])
    dtype, size = random.choice(
        [("I8", 1), ("U8", 1), ("I32", 4), ("I64", 8), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I16", 2)]
    )
    out, new = bytearray(), {}
    for name in sorted(names, key=lambda n: header[n]["data_offsets"][0]):
        start, end = header[name]["data_offsets"]
        entry = dict(header[name])
        data = body[start:end]
        if name in chosen:
            count = (end - start) // 4
            data = (
                random.randbytes(count * size)
                if dtype != "BOOL"
                else bytes(random.getrandbits(1) for _ in range(count))
            )
            entry["dtype"] = dtype
        entry["data_offsets"] = [len(out), len(out) + len(data)]
        out += data
        new[name] = entry
    write_shard(path, new, bytes(out))
    return f"{len(chosen)} tensors as {dtype}: {chosen[0]}"


def _numbers(random: Random, root: Path, place: Place) -> str:
    path = root / "model.safetensors"
    header, body = read_shard(path)
    name = random.choice([n for n in header if n != "__metadata__"])
    start, end = header[name]["data_offsets"]
    number = random.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    at = start + 4 * random.randrange((end - start) // 4)
    write_shard(path, header, body[:at] + struct.pack("<f", number) + body[at + 4 :])
    return f"{name} holds {number}"


def _tensor_names(random: Random, root: Path, place: Place) -> str:
    path = root / "model.safetensors"
    header, body = read_shard(path)
    names = [n for n in header if n != "__metadata__"]
    match random.randrange(4):
        case 0:
            prefix = random.choice(
                ["module.", "_orig_mod.", "base_model.model.", "model.", "x", "language_model.", "\x00"]
            )
            header = {prefix + n: header[n] for n in names}
            what = f"all begin with {prefix!r}"
        case 1:
            name = random.choice(names)
            header[name + random.choice(["_", ".absmax", "_scale", ".base_layer", "\n"])] = header.pop(name)
            what = f"{name} renamed"
        case 2:
            lost = random.choice(names)
            start, end = header[lost]["data_offsets"]
            header = {n: header[n] for n in names if n != lost}
            for entry in header.values():
                if entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [o - (end - start) for o in entry["data_offsets"]]
            body = body[:start] + body[end:]
            what = f"{lost} is missing"
        case _:
            old = random.choice(["q_proj", "experts", "layers.0", "weight"])
            new = random.choice(
                [
                    "q_proj.lora_A",
                    "expert",
                    "layers.7",
                    "layers.-1",
                    "layers.99999999999999999999",
                    "qweight",
                    "weight_packed",
                ]
            )
            header = {n.replace(old, new): header[n] for n in names}
            what = f"{old} is called {new}"
    write_shard(path, header, body)
    return what


def _index(random: Random, root: Path, place: Place) -> str:
    """A shard under another name, and an index over it that is stale, odd, or leads elsewhere."""
    shard = "model-00001-of-00001.safetensors"
    (root / "model.safetensors").rename(root / shard)
    names = [n for n in read_shard(root / shard)[0] if n != "__metadata__"]
    index: Any = {"metadata": {"total_size": 5}, "weight_map": dict.fromkeys(names, shard)}
    path = root / "model.safetensors.index.json"
    match random.randrange(4):
        case 0:
            index["weight_map"][random.choice(names)] = random.choice(
                [
                    "../../canary/.ssh/id",
                    "/etc/passwd",
                    "gone.safetensors",
                    "",
                    ".",
                    5,
                    None,
                    "x" * 5000,
                    "a\x00",
                    [],
                    "config.json",
                ]
            )
            what = "a tensor elsewhere"
        case 1:
            index["weight_map"] = random.choice([[], {}, None, "x", {"a": shard}, dict.fromkeys(names[:3], shard)])
            what = f"weight_map {mutate.shown(index['weight_map'])}"
        case _:
            path.write_bytes(mutate.json_bytes(index))
            return _edit_json(random, path, ((), ("weight_map",), ("metadata",)))
    path.write_bytes(mutate.json_bytes(index))
    return what


def _tokenizer(random: Random, root: Path, place: Place) -> str:
    if random.random() < 0.4:
        path = root / "tokenizer.json"
        document = json.loads(path.read_text())
        keys, value = random.choice(hostile.TOKENIZERS)
        mutate.get(document, keys[:-1])[keys[-1]] = value
        path.write_bytes(mutate.json_bytes(document))
        return f"tokenizer.json: {'.'.join(keys)} = {mutate.shown(value)}"
    name = random.choice(
        [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.json",
        ]
    )
    path = root / name
    if not path.exists():
        path.write_text(
            random.choice(['{"eos_token": "</s>"}', '{"<new>": 5}', '{"chat_template": "x"}', '{"<new>": 99999}'])
        )
    if name == "tokenizer_config.json" and random.random() < 0.5:
        (root / "chat_template.jinja").unlink(missing_ok=True)
        template: Any = random.choice(
            [
                [5],
                [{}],
                [],
                {},
                5,
                "",
                "\ud800",
                [{"name": "default"}],
                [{"name": ["a"], "template": "x"}],
                [{"name": "tool", "template": "x"}],
                {"default": "x"},
                [{"name": "default", "template": 5}],
                random.choice(hostile.TEMPLATES),
            ]
        )
        path.write_bytes(mutate.json_bytes({**json.loads(path.read_text()), "chat_template": template}))
        return f"chat_template: {mutate.shown(template)}"
    return _edit_json(random, path)


def _template(random: Random, root: Path, place: Place) -> str:
    template = random.choice(hostile.TEMPLATES).encode("utf-8", "surrogatepass")
    what = mutate.shown(template.decode("utf-8", "replace"))
    if random.random() < 0.2:
        template, what = mutate.raw(random, template)
    (root / "chat_template.jinja").write_bytes(template)
    return what


def _card(random: Random, root: Path, place: Place) -> str:
    text = random.choice(hostile.CARDS)
    card = f"---\n{text}\n---\n# Model\n".encode()
    what = mutate.shown(text)
    if random.random() < 0.1:
        card, what = mutate.raw(random, card)
    (root / "README.md").write_bytes(card)
    return what


def _generation(random: Random, root: Path, place: Place) -> str:
    path = root / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "eos_token_id": [1, 5],
                "bos_token_id": 0,
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 20,
            }
        )
    )
    return _edit_json(random, path)


def _links(random: Random, root: Path, place: Place) -> str:
    """Links to what is none of a checkpoint's business."""
    name = random.choice(
        [
            "tokenizer_config.json",
            "README.md",
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "generation_config.json",
            "chat_template.jinja",
            "special_tokens_map.json",
            "added_tokens.json",
            "LICENSE",
        ]
    )
    path = root / name
    if random.random() < 0.3:
        return f"{name}: {replace(random, path, str(place.canary / 'secret.json'))}"
    path.unlink(missing_ok=True)
    target = random.choice(
        [
            "../../canary/.ssh/id",
            "../../canary/secret.json",
            str(place.canary / "secret.json"),
            "/dev/zero",
            name,
            "../../canary",
            "/proc/self/environ",
        ]
    )
    path.symlink_to(target)
    return f"{name} -> {Path(target).name}"


def _pointer(random: Random, root: Path, place: Place) -> str:
    name = random.choice(
        [
            "model.safetensors",
            "tokenizer.json",
            "config.json",
            "tokenizer_config.json",
            "generation_config.json",
            "chat_template.jinja",
        ]
    )
    (root / name).write_text(_POINTER)
    return f"{name} is a pointer of Git LFS"


def _quantized(random: Random, root: Path, place: Place) -> str:
    path = root / "config.json"
    config = json.loads(path.read_text())
    name = random.choice(["quantization_config", "quantization_config", "compression_config"])
    config[name] = random.choice(_METHODS)
    path.write_bytes(mutate.json_bytes(config))
    what = f"{name} = {mutate.shown(config[name])}"
    return f"{what}; {_dtypes(random, root, place)}" if random.random() < 0.4 else what


def _adapter(random: Random, root: Path, place: Place) -> str:
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "x/y",
    }
    document, what = mutate.edit(random, config) if random.random() < 0.5 else (config, "as peft writes it")
    (root / "adapter_config.json").write_bytes(mutate.json_bytes(document))
    shutil.copyfile(root / "model.safetensors", root / "adapter_model.safetensors")
    if random.random() < 0.4:
        (root / random.choice(["model.safetensors", "config.json"])).unlink()
    return f"adapter: {what}"


def _missing(random: Random, root: Path, place: Place) -> str:
    name = random.choice([path.name for path in root.iterdir()])
    (root / name).unlink()
    other = random.choice(["", "pytorch_model.bin", "model.gguf", "modeling_x.py"])
    if other:
        (root / other).write_bytes(b"\x80\x04x.")
    return f"no {name}, but {other or 'nothing else'}"


_KINDS: dict[str, tuple[int, Callable[[Random, Path, Place], str]]] = {
    "config": (20, _config),
    "sizes": (6, _sizes),
    "shard": (5, _shard),
    "header": (8, _header),
    "dtypes": (8, _dtypes),
    "numbers": (2, _numbers),
    "names": (6, _tensor_names),
    "index": (6, _index),
    "tokenizer": (10, _tokenizer),
    "template": (4, _template),
    "card": (8, _card),
    "generation": (5, _generation),
    "links": (5, _links),
    "pointer": (2, _pointer),
    "quantized": (5, _quantized),
    "adapter": (3, _adapter),
    "missing": (2, _missing),
}
