"""Bundles by somebody else. An attacker can seal: most changes come with a manifest that agrees with them."""

# pyright: reportMatchNotExhaustive=false

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import hostile, mutate
from tests.fuzz.cases import MIB, SLACK_BYTES, Case, Step, command
from tests.fuzz.graphs import mutate_graph
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds
from tests.fuzz.zygote import Order

BUDGET_BYTES = 200 * MIB
_FAMILIES = ("olmoe", "olmoe", "olmoe-int4", "deepseek_v3")
_TRAILER_BYTES = 64


def seal(root: Path, manifest: dict[str, Any], relist: bool = True) -> None:
    """Write a manifest that fits the files (`relist`) and its own hash, by docs/FORMAT.md alone."""
    if relist:
        for name, entry in manifest["files"].items():
            path = root / name
            if path.is_file() and not path.is_symlink() and isinstance(entry, dict):
                data = path.read_bytes()
                entry.update(nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    zeros = "0" * 64
    text = json.dumps({"sha256": zeros, **{k: v for k, v in manifest.items() if k != "sha256"}}, indent=2).encode()
    (root / "manifest.json").write_bytes(text.replace(zeros.encode(), hashlib.sha256(text).hexdigest().encode(), 1))


def load(root: Path) -> dict[str, Any]:
    return json.loads((root / "manifest.json").read_bytes())


def make(random: Random, place: Place, seeds: Seeds) -> Case:
    """One mutated bundle at cwd/b, and a command that meets it."""
    family = random.choice(_FAMILIES) if not seeds.small else "olmoe"
    source, bundle = seeds.bundle(family), place.cwd / "b"
    keep_packed = random.random() < 0.5
    shutil.copytree(source, bundle, ignore=None if keep_packed else shutil.ignore_patterns("packed"))
    kind = random.choices([*_KINDS], weights=[weight for weight, _ in _KINDS.values()])[0]
    what = _KINDS[kind][1](random, bundle, place)
    if kind == "unsealed":
        return _damage(random, f"{family}: {what}", source, seeds)
    if kind == "index":
        run = Step(_run(random, "b"))
        return Case(kind, f"{family}: {what}", (Step(command("verify", "b")), run), all_steps=True, agree=True)
    step = _command(random, kind)
    return Case(kind, f"{family}: {what}", (step,))


def _run(random: Random, bundle: str, chat: bool = False) -> Order:
    options: list[object] = ["--max-tokens", random.choice([1, 3, 8]), "--memory", BUDGET_BYTES]
    options += random.choice(
        [
            [],
            [],
            ["--backend", "sessions"],
            ["--prefetch", "on"],
            ["--temperature", "0.7"],
            ["--json"],
            ["--threads", "1"],
            ["--drop-cold", "0.5"],
            ["--prefer-cached", "0.5"],
        ]
    )
    prompt = random.choice(hostile.PROMPTS[:9]) if random.random() < 0.3 else "once upon a time"
    options += [] if chat else random.choice([["--raw"], []])
    return command("run", bundle, "--prompt", prompt, *options, memory_bytes=BUDGET_BYTES + SLACK_BYTES)


def _command(random: Random, kind: str) -> Step:
    if kind in {"template", "tokenizer"}:
        return Step(_run(random, "b", chat=kind == "template"))
    name = random.choices(
        ["run", "eval", "verify", "inspect", "profile", "quantize", "portable", "plan"],
        weights=[70, 10, 6, 6, 2, 3, 2, 1],
    )[0]
    match name:
        case "run":
            return Step(_run(random, "b"))
        case "eval":
            memory = ("--memory", BUDGET_BYTES)
            return Step(
                command(
                    "eval",
                    "b",
                    "--text",
                    "text.txt",
                    "--max-tokens",
                    40,
                    *memory,
                    memory_bytes=BUDGET_BYTES + SLACK_BYTES,
                )
            )
        case "verify" | "inspect":
            return Step(command(name, "b", *random.choice([[], ["--json"]] if name == "inspect" else [[]])))
        case "profile":
            options = ("--memory", "50%", "--prompt-tokens", 4, "--output-tokens", 4)
            return Step(command("profile", "b", "-o", "p", *options), writes=("p",))
        case "quantize":
            return Step(
                command("quantize", "b", "-o", "q", "--scheme", random.choice(["int4", "int8"]), heavy=True),
                writes=("q",),
            )
        case "portable":
            return Step(command("export-portable", "b", "-o", "m.onnx", heavy=True), writes=("m.onnx", "m-*.data"))
        case _:
            return Step(command("plan", "b", "--device", "pi5-8gb"))


def _damage(random: Random, what: str, source: Path, seeds: Seeds) -> Case:
    """Damage without a seal: `verify` must see it; `run` must see it, or not have touched it."""
    refused = frozenset({3})
    run = ("--prompt", "once", "--raw", "--max-tokens", 3, "--json")
    steps = (
        Step(command("verify", "b"), refused),
        Step(command("run", "b", *run, "--memory", BUDGET_BYTES), frozenset({0, 3})),
    )
    return Case("unsealed", what, steps, all_steps=True)


def _manifest(random: Random, bundle: Path, place: Place) -> str:
    manifest = load(bundle)
    notes = []
    for _ in range(random.choice([1, 1, 1, 2])):
        manifest, note = mutate.edit(
            random,
            manifest,
            ((), ("model",), ("states",), ("moe_layers",), ("segments",), ("expert_kinds",), ("dense",), ("inputs",)),
        )
        notes.append(note)
    seal(bundle, manifest, relist=False)
    return "; ".join(notes)


def _manifest_size(random: Random, bundle: Path, place: Place) -> str:
    """A manifest of many entries, or raw damage under a seal that fits."""
    manifest = load(bundle)
    match random.randrange(5):
        case 0:
            count = random.choice([10**5, 10**6, 5 * 10**6])
            manifest["model"]["eos_token_ids"] = [1] * count
            what = f"{count} ends of text"
        case 1:
            count = random.choice([10**4, 10**6, 3 * 10**6])
            manifest["provenance"]["tools"] = {str(n): "" for n in range(count)}
            what = f"{count} tools"
        case 2:
            manifest["notes"] = ["x" * 1000] * 60_000
            what = "60 MB of notes"
        case 3:
            manifest["states"] = manifest["states"] * 50_000
            what = "50,000 times the states"
        case _:
            manifest["model"]["n_parameters"] = 10 ** random.choice([20, 300, 3999])
            what = "parameters without end"
    seal(bundle, manifest, relist=False)
    return what


def _graph(random: Random, bundle: Path, place: Place) -> str:
    graphs = sorted(path for path in (bundle / "graphs").glob("*.onnx"))
    path = random.choice(graphs)
    data, what = mutate_graph(random, path.read_bytes())
    path.write_bytes(data)
    manifest = load(bundle)
    seal(bundle, manifest)
    return f"{path.name}: {what}"


def _weights(random: Random, bundle: Path, place: Place) -> str:
    """Dense weights that make NaN, infinities, or nothing."""
    path = bundle / "graphs/dense.bin"
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    fill = random.choice([np.float32("nan"), np.float32("inf"), np.float32(3e38), np.float32(0)])
    whole = data[: len(data) // 4 * 4].view(np.float32)
    start = random.randrange(len(whole))
    count = random.choice([1, 100, len(whole)])
    whole[start : start + count] = fill
    path.write_bytes(data.tobytes() if random.random() < 0.8 else data.tobytes()[:-4096])
    seal(bundle, load(bundle))
    return f"dense.bin: {count} times {fill} from {start}"


def _index(random: Random, bundle: Path, place: Place) -> str:
    """The store's index and trailer, with all hashes made to fit."""
    path = bundle / "experts.bin"
    data = path.read_bytes()
    offset = int.from_bytes(data[-56:-48], "little")
    length = int.from_bytes(data[-48:-40], "little")
    index = json.loads(data[offset : offset + length])
    match random.randrange(5):
        case 0:
            record = random.choice(index)
            record[5] = hashlib.sha256(b"other").hexdigest()
            what = f"the hash of {record[:2]} is another"
        case 1:
            record = random.choice(index)
            data = bytearray(data)
            data[record[3] + random.randrange(record[4])] ^= 1
            what = f"a bit of {record[:2]}, the file's hash fits"
        case 2 | 3:
            index, what = mutate.edit(random, index, ((random.randrange(len(index)),),))
        case _:
            index = random.choice([[], index * 2, index[:-1], index[::-1], [*index, [10**6, 0, 0, 0, 4096, "0" * 64]]])
            what = f"{len(index)} records"
    try:
        text = mutate.json_bytes(index)
    except RecursionError:
        text = b"[]"
    digest = hashlib.sha256(text).digest()
    trailer = b"PMOESTR1" + offset.to_bytes(8, "little") + len(text).to_bytes(8, "little") + digest + bytes(8)
    if random.random() < 0.15:
        trailer, more = mutate.raw(random, trailer)
        what = f"{what}; trailer: {more}"
    path.write_bytes(bytes(data[:offset]) + text + trailer)
    manifest = load(bundle)
    manifest["store_index_sha256"] = digest.hex()
    seal(bundle, manifest)
    return what


def _tokenizer(random: Random, bundle: Path, place: Place) -> str:
    path = bundle / "tokenizer/tokenizer.json"
    document = json.loads(path.read_text())
    if random.random() < 0.5:
        keys, value = random.choice(hostile.TOKENIZERS)
        mutate.get(document, keys[:-1])[keys[-1]] = value
        data, what = mutate.json_bytes(document), f"{'.'.join(keys)} = {mutate.shown(value)}"
    elif random.random() < 0.6:
        document, what = mutate.edit(
            random, document, ((), ("model",), ("added_tokens",), ("decoder",), ("pre_tokenizer",))
        )
        data = mutate.json_bytes(document)
    else:
        data, what = mutate.raw(random, path.read_bytes())
    path.write_bytes(data)
    seal(bundle, load(bundle))
    return f"tokenizer.json: {what}"


def _template(random: Random, bundle: Path, place: Place) -> str:
    template = random.choice(hostile.TEMPLATES)
    if random.random() < 0.2:
        template += random.choice(hostile.TEMPLATES)
    (bundle / "tokenizer/chat_template.jinja").write_bytes(template.encode("utf-8", "surrogatepass"))
    seal(bundle, load(bundle))
    return mutate.shown(template)


def _packed(random: Random, bundle: Path, place: Place) -> str:
    """Links and other things at packed/, which no manifest names."""
    packed = bundle / "packed"
    keys = sorted(path.name for path in packed.iterdir()) if packed.is_dir() else []
    target = random.choice(
        [
            "../../canary",
            "../../canary/Documents",
            "../../canary/empty",
            str(place.canary),
            "../../nowhere",
            "/dev/null",
            ".",
        ]
    )
    if not keys or random.random() < 0.35:
        shutil.rmtree(packed, ignore_errors=True)
        what = replace(random, packed, target)
    else:
        path = packed / keys[0]
        inner = sorted(p for p in path.rglob("*"))
        if random.random() < 0.3:
            what = f"{path.name}: {replace(random, path, target)}"
        else:
            path = random.choice(inner)
            if random.random() < 0.4 or not path.is_file():
                what = f"{path.name}: {replace(random, path, target)}"
            else:
                data, what = mutate.raw(random, path.read_bytes())
                path.write_bytes(data)
                what = f"{path.name}: {what}"
    for name in random.sample(["0123456789abcdef", "other", ".hidden", "x.partial"], 2):
        if packed.is_dir() and not packed.is_symlink():
            (packed / name).mkdir(exist_ok=True)
    return f"packed: {what}"


def replace(random: Random, path: Path, target: str) -> str:
    """Put something else where a file or directory was."""
    kind = random.choice(
        ["link", "link", "link", "fifo", "directory", "device", "socket", "hard link", "nothing", "file"]
    )
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(target)
            return f"link to {target if target.startswith('.') else Path(target).name}"
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, random.choice([3, 5])))  # /dev/null, /dev/zero
            except PermissionError:
                path.symlink_to("/dev/zero")
        case "socket" if len(os.fsencode(path)) < 100:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(str(path))
        case "hard link":
            os.link(path.parents[len(path.parts) - path.parts.index("cwd") - 1] / "canary/secret.json", path)
        case "file":
            path.write_text("x")
    return kind


def _places(random: Random, bundle: Path, place: Place) -> str:
    """Something else in the place of a file of the bundle."""
    names = [*load(bundle)["files"], "manifest.json", "graphs", "tokenizer"]
    name = random.choice(names)
    target = random.choice(
        [str(place.canary / "secret.json"), "/dev/zero", "/dev/stdin", str(bundle / "manifest.json"), "../../canary"]
    )
    what = replace(random, bundle / name, target)
    if (bundle / "manifest.json").is_file():
        manifest = load(bundle) if name != "manifest.json" or what != "file" else None
        if manifest and "files" in manifest:
            seal(bundle, manifest)
    return f"{name}: {what}"


def _names(random: Random, bundle: Path, place: Place) -> str:
    """Files under names that lead elsewhere, and files that no manifest knows."""
    manifest = load(bundle)
    name = random.choice(
        [
            "../../canary/secret.json",
            "/etc/passwd",
            "graphs/../../x",
            "graphs//x.onnx",
            "a\\b",
            "\x1b[2J",
            "graphs/extra.onnx",
            "packed/x",
            "",
            ".",
            "tokenizer/../manifest.json",
            "x" * 5000,
        ]
    )
    entry = {"nbytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    if random.random() < 0.5:
        manifest["files"][name] = entry
        if name in {"graphs/extra.onnx", "packed/x"}:
            (bundle / name).parent.mkdir(exist_ok=True)
            (bundle / name).write_bytes(b"{}")
    else:
        old = random.choice([*manifest["files"]])
        text = json.dumps(manifest).replace(json.dumps(old)[1:-1], json.dumps(name)[1:-1])
        manifest = json.loads(text)
    seal(bundle, manifest, relist=False)
    return f"a file {name[:40]!r}"


def _unsealed(random: Random, bundle: Path, place: Place) -> str:
    """Damage of disk or transfer: nothing is sealed again."""
    shutil.rmtree(bundle / "packed", ignore_errors=True)
    path = bundle / random.choice([*load(bundle)["files"], "manifest.json", "experts.bin", "graphs/dense.bin"])
    data = path.read_bytes()
    while True:
        changed, what = mutate.raw(random, data)
        if changed != data:
            path.write_bytes(changed)
            return f"{path.name}: {what}"


_KINDS: dict[str, tuple[int, Callable[[Random, Path, Place], str]]] = {
    "manifest": (20, _manifest),
    "manifest size": (2, _manifest_size),
    "graph": (32, _graph),
    "weights": (4, _weights),
    "index": (7, _index),
    "tokenizer": (8, _tokenizer),
    "template": (8, _template),
    "packed": (7, _packed),
    "places": (5, _places),
    "names": (3, _names),
    "unsealed": (4, _unsealed),
}
