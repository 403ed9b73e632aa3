"""Everything else that is typed or read: values of options, texts, traces, profiles, prices, gates, endpoint records."""

# ruff: noqa: E501, RUF001

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pocketmoe
from tests.fuzz import mutate
from tests.fuzz.bundles import BUDGET_BYTES, replace
from tests.fuzz.cases import SLACK_BYTES, Case, Step, command
from tests.fuzz.place import Place
from tests.fuzz.seeds import Seeds

_DEVICES_FILE = Path(pocketmoe.__file__).parent / "profiles/catalogue/devices.toml"
_SIZES = (
    "0",
    "0.5",
    "1",
    "-1",
    "800",
    "1e400",
    "nan",
    "inf",
    "4G",
    "1.5GiB",
    "40%",
    "0%",
    "100%",
    "101%",
    "-5%",
    "1e-300%",
    "nan%",
    "9" * 400,
    "9" * 5000,
    "800MB",
    "800 MB",
    "1TB",
    "999999TB",
    "MB",
    "%",
    "",
    " ",
    "１２８MB",
    "0x10",
    "1_000MB",
    "1,5GB",
    "least",
    "99999999999999999999GB",
    "1b",
    "40%%",
    "١MB",
)
_NUMBERS = (
    "0",
    "1",
    "-1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "1e-320",
    "0.5",
    "1e308",
    "9" * 30,
    "9" * 5000,
    "",
    "x",
    "٣",
    "1_0",
    "0x1",
    "1.0",
    "-0.0",
    "1e5",
    "100000",
)
_TEXTS = (
    "",
    " ",
    "x",
    "\x00"[:0],
    "a" * 50_000,
    "é\u4f60\U0001f600",
    "\udcff\udcfe",
    "\x1b[31m",
    "../canary/.ssh/id",
    "--json",
    "-",
    "<s>",
    "\n",
    "a b",
    "ö" * 300,
)
_DEVICES = ("pi5-8gb", "this", "nonsense", "", "\x1b", "x" * 10_000)


def make(random: Random, place: Place, seeds: Seeds) -> Case:
    """One command with one odd value, or one odd file."""
    kind = random.choices([*_KINDS], weights=[weight for weight, _ in _KINDS.values()])[0]
    return _KINDS[kind][1](random, place, seeds)


def _bundle(place: Place, seeds: Seeds) -> None:
    shutil.copytree(seeds.bundle("olmoe"), place.cwd / "b")


def _trace(place: Place, seeds: Seeds) -> Path:
    seeds.bundle("olmoe")
    for path in seeds.root.glob("bundle-olmoe/trace.npy*"):
        shutil.copyfile(path, place.cwd / path.name)
    return place.cwd / "trace.npy"


def _run_options(random: Random, place: Place, seeds: Seeds) -> Case:
    _bundle(place, seeds)
    values = {
        "--memory": _SIZES,
        "--max-tokens": _NUMBERS,
        "--temperature": _NUMBERS,
        "--top-p": _NUMBERS,
        "--seed": _NUMBERS,
        "--threads": _NUMBERS,
        "--drop-cold": _NUMBERS,
        "--prefer-cached": _NUMBERS,
        "--prompt": _TEXTS,
        "--backend": ("auto", "x", ""),
        "--prefetch": ("on", "", "x"),
    }
    options = {"--prompt": "once", "--memory": str(BUDGET_BYTES), "--max-tokens": "3"}
    chosen = random.sample([*values], random.choice([1, 1, 2]))
    options |= {name: random.choice(values[name]) for name in chosen}
    flat = [part for name, value in options.items() for part in (f"{name}={value}",)]
    flat += random.choice([[], ["--raw"], ["--json"]])
    limit = BUDGET_BYTES + SLACK_BYTES if "--memory" not in chosen else 0
    return Case(
        "run options", f"run {_shown(options, chosen)}", (Step(command("run", "b", *flat, memory_bytes=limit)),)
    )


def _shown(options: dict[str, str], chosen: list[str]) -> str:
    return " ".join(f"{name}={mutate.shown(options[name])}" for name in chosen)


def _other_options(random: Random, place: Place, seeds: Seeds) -> Case:
    """The options of the other commands."""
    shutil.copytree(seeds.profile(), place.cwd / "p")
    _bundle(place, seeds)
    _trace(place, seeds)
    name, fixed, values, heavy, writes = random.choice(
        [
            (
                "compare",
                ["p", "-o", "o"],
                {
                    "--device-price": _NUMBERS,
                    "--resale": _NUMBERS,
                    "--years": _NUMBERS,
                    "--utilisation": _NUMBERS,
                    "--cloud-utilisation": _NUMBERS,
                    "--usd-per-kwh": _NUMBERS,
                    "--load-watts": _NUMBERS,
                    "--idle-watts": _NUMBERS,
                    "--users": _NUMBERS,
                    "--cloud": _TEXTS,
                    "--device": _DEVICES,
                    "--model": _TEXTS,
                    "--gpu": _TEXTS,
                    "--instance": _TEXTS,
                    "--timeout": _NUMBERS,
                    "--requests": _NUMBERS,
                    "--concurrency": (*_NUMBERS, "1,x", ",", "1,1,1"),
                },
                False,
                ("o",),
            ),
            (
                "compare",
                ["p", "-o", "o", "--timeout", "1"],
                {
                    "--endpoint": (
                        "http://[",
                        "http://a..b",
                        "http://x/é",
                        "http://127.0.0.1:1",
                        "http://127.0.0.1:99999",
                        "ftp://x",
                        "x",
                        "",
                        "http://",
                        "http://x y/",
                        "http://\udcff",
                        "file:///etc/passwd",
                        "https://127.0.0.1:1/" + "x" * 9999,
                    )
                },
                False,
                ("o",),
            ),
            (
                "plan",
                ["b"],
                {
                    "--device": _DEVICES[:1],
                    "--target-tokens-per-s": _NUMBERS,
                    "--context": _NUMBERS,
                    "--prompt-tokens": _NUMBERS,
                    "--reserve": _SIZES,
                },
                False,
                (),
            ),
            ("plan", ["b"], {"--device": (_DEVICES[0], *_DEVICES[2:])}, False, ()),
            (
                "replay",
                ["trace.npy", "--bundle", "b"],
                {"--memory": (*_SIZES, "10%,20%", ",", "10%,x"), "--policy": _TEXTS},
                False,
                (),
            ),
            (
                "eval",
                ["b", "--text", "text.txt"],
                {
                    "--memory": _SIZES,
                    "--max-tokens": _NUMBERS,
                    "--drop-cold": _NUMBERS,
                    "--threads": _NUMBERS,
                    "--ood": _TEXTS,
                    "--free": _NUMBERS,
                },
                False,
                (),
            ),
            (
                "quantize",
                ["b", "-o", "q"],
                {
                    "--scheme": ("int4", "mixed", "x", "", "keep"),
                    "--format": (
                        "experts=int4-b32",
                        "x",
                        "=",
                        "experts=",
                        "experts=int4-b0",
                        "experts=int999",
                        "x=y",
                        "experts=int4-b" + "9" * 400,
                    ),
                    "--size-budget": (*_SIZES, "3.5bits", "0bits", "nanbits", "-1bits"),
                    "--fetch-budget": _SIZES,
                    "--rounding": ("nearest", "x", ""),
                    "--workers": (*_NUMBERS[:8], "x"),
                    "--calibration-tokens": _NUMBERS,
                },
                True,
                ("q",),
            ),
            ("profile", ["p", "-o", "o"], {"--predict": (*_DEVICES, "pi5-16gb"), "--slow-disk": _SIZES}, False, ("o",)),
            ("inspect", [], {"": (*_TEXTS, "b", "/dev/zero", "/dev/null", "trace.npy", "p")}, False, ()),
            ("verify", [], {"": (*_TEXTS, "b", "/dev/zero", "p")}, False, ()),
            (
                "export",
                ["-o", "e"],
                {"": (*_TEXTS, "../../x", "a/b/c", "org/..", "https://x", "hf://x", "text.txt", "/dev/null", "b", "p")},
                True,
                ("e",),
            ),
        ]
    )
    chosen = random.choice([*values])
    value = random.choice(values[chosen])
    arguments = [name, *fixed, *([f"{chosen}={value}"] if chosen else [*random.choice([["--"], []]), value])]
    if name == "plan" and chosen != "--device":
        arguments.append("--device=pi5-8gb")
    step = Step(command(*arguments, heavy=heavy), writes=writes)
    return Case("options", f"{name} {chosen}={mutate.shown(value)}", (step,))


def _trace_file(random: Random, place: Place, seeds: Seeds) -> Case:
    path = _trace(place, seeds)
    path = random.choice([path, path.with_name("trace.npy.json")])
    if not path.exists():
        path = place.cwd / "trace.npy"
    what = _spoil(random, path, place)
    bundle = []
    if random.random() < 0.5:
        _bundle(place, seeds)
        bundle = ["--bundle", "b"]
    return Case("trace", f"{path.name}: {what}", (Step(command("replay", "trace.npy", *bundle)),))


def _spoil(random: Random, path: Path, place: Place) -> str:
    """A damaged or replaced file; JSON is changed as JSON, most of the time."""
    if random.random() < 0.12:
        return replace(
            random, path, random.choice(["/dev/zero", str(place.canary / "secret.json"), "../../canary", path.name])
        )
    if path.suffix == ".json" and random.random() < 0.8:
        document = json.loads(path.read_bytes())
        document, what = mutate.edit(random, document)
        path.write_bytes(mutate.json_bytes(document))
        return what
    if path.suffix == ".npy" and random.random() < 0.5:
        data = path.read_bytes()
        end = data.index(b"\n")
        header = data[10:end].decode("latin-1")
        old, new = random.choice(
            [
                ("<u2", "|O"),
                ("<i2", "|O"),
                ("'descr'", "'x'"),
                ("(", "(-1, "),
                ("(", "(99999999999, "),
                ("False", "True"),
                ("{", "{" * 50),
                ("(", "(" + "1," * 40),
            ]
        )
        text = header.replace(old, new).encode("latin-1")
        path.write_bytes(data[:8] + len(text + b"\n").to_bytes(2, "little") + text + data[end:])
        return f"header: {old} -> {new[:20]}"
    data, what = mutate.raw(random, path.read_bytes())
    path.write_bytes(data)
    return what


def _profile_file(random: Random, place: Place, seeds: Seeds) -> Case:
    shutil.copytree(seeds.profile(), place.cwd / "p")
    what = _spoil(random, place.cwd / "p/profile.json", place)
    arguments = random.choice(
        [
            ["compare", "p", "-o", "o"],
            ["profile", "p", "-o", "o", "--predict", "pi5-8gb"],
            ["compare", "p/profile.json"],
        ]
    )
    return Case("profile", f"{arguments[0]}: {what}", (Step(command(*arguments), writes=("o",)),))


def _text_file(random: Random, place: Place, seeds: Seeds) -> Case:
    """What eval, calibration and profiles read as text."""
    _bundle(place, seeds)
    path = place.cwd / "text.txt"
    match random.randrange(4):
        case 0:
            what = _spoil(random, path, place)
        case 1:
            data = random.choice(
                [
                    b"",
                    b"\n",
                    b"x",
                    b"\x00" * 1000,
                    b"\xff" * 1000,
                    os.urandom(0) + bytes(range(256)) * 8,
                    b"a" * 2_000_000,
                    "\ud800".encode("utf-8", "surrogatepass"),
                ]
            )
            path.write_bytes(data)
            what = f"{len(data)} bytes {data[:4]!r}"
        case _:
            path.unlink()
            path.mkdir()
            for n in range(random.choice([0, 1, 3])):
                (path / f"{n}.txt").write_text("once upon a time there was " * 20)
            what = f"a directory: {replace(random, path / '1.txt', random.choice(['/dev/zero', '../../canary/.ssh/id', '.']))}"
    gate: list[str] = []
    if random.random() < 0.2:
        gate = ["--gate", "g.txt"]
        text = random.choice(
            [
                "mean_kl <= 0.02",
                "x <= 1",
                "perplexity <= nan",
                "perplexity <= 1e400",
                "worst: top1 >= 0.9",
                "perplexity < 5 < 6",
                "\x00",
                "perplexity <= " + "9" * 5000,
                "",
                "a" * 10**6,
                "perplexity <= -1",
            ]
        )
        (place.cwd / "g.txt").write_text(text)
        what += f"; gate {text[:40]!r}"
    arguments = random.choice(
        [
            ["eval", "b", "--text", "text.txt", "--max-tokens", "64", *gate],
            ["eval", "b", "--text", "text.txt", "--max-tokens", "64", "--resume", "j", *gate],
            [
                "quantize",
                "b",
                "-o",
                "q",
                "--scheme",
                "int4",
                "--calibration",
                "text.txt",
                "--calibration-tokens",
                "512",
            ],
        ]
    )
    if arguments[0] == "quantize":
        return Case("texts", f"quantize: {what}", (Step(command(*arguments, heavy=True), writes=("q",)),))
    if "--resume" in arguments and random.random() < 0.5:
        (place.cwd / "j").write_bytes(
            random.choice([b"", b"x\n", b'{"a": 1}\n', mutate.deep().encode(), b"\x00" * 100])
        )
    return Case("texts", f"eval: {what}", (Step(command(*arguments), writes=("j",)),))


def _prices(random: Random, place: Place, seeds: Seeds) -> Case:
    shutil.copytree(seeds.profile(), place.cwd / "p")
    gpu = '[[gpu]]\nname = "T4"\nmemory_bytes = 16e9\nbandwidth_bytes_per_s = 320e9\ndense_flops_per_s = 65e12\nwatts = 70\nsource = "x"\nas_of = 2026-11-23\nconfidence = "V"\n'
    number = random.choice(
        [
            "1e-300",
            "0",
            "-1",
            "nan",
            "inf",
            "9" * 5000,
            "1e400",
            '"x"',
            "[]",
            "{}",
            "true",
            "2026-01-01",
            "0x" + "f" * 4000,
        ]
    )
    field = random.choice(
        [
            "memory_bytes = 16e9",
            "bandwidth_bytes_per_s = 320e9",
            "dense_flops_per_s = 65e12",
            "watts = 70",
            "as_of = 2026-11-23",
            'name = "T4"',
        ]
    )
    text = gpu.replace(field, f"{field.split(' ')[0]} = {number}")
    what = f"{field.split(' ')[0]} = {number[:20]}"
    if random.random() < 0.3:
        text = random.choice(
            [
                ".".join(["a"] * 100_000) + " = 1",
                "x = " + "[" * 5000 + "]" * 5000,
                "[[gpu]]\n" * 10_000,
                "\x00",
                "gpu = 5",
                "[gpu]\nx = 1",
                "a = " + "{ b = " * 3000 + "1" + " }" * 3000,
                '"\\ud800" = 1',
            ]
        )
        what = mutate.shown(text)
    (place.cwd / "prices.toml").write_text(text)
    return Case("prices", what, (Step(command("compare", "p", "-o", "o", "--prices", "prices.toml"), writes=("o",)),))


def _devices(random: Random, place: Place, seeds: Seeds) -> Case:
    """Devices of the user's own, for plan."""
    _bundle(place, seeds)
    path = place.cwd / "devices.toml"
    text = _DEVICES_FILE.read_text(encoding="utf-8")
    start = text.index("[pi5-8gb]")
    path.write_text(text[start : text.index("\n[", start + 1)].replace("pi5-8gb", "mine"), encoding="utf-8")
    if random.random() < 0.5:
        fields = [line.split(" =")[0] for line in path.read_text().splitlines() if " = {" in line]
        field, value = random.choice(fields), random.choice([*_NUMBERS, '"x"', "[]", "{}", "true", "{ value = -1 }"])
        lines = [
            f"{field} = {value}" if line.startswith(f"{field} =") else line for line in path.read_text().splitlines()
        ]
        path.write_text("\n".join(lines))
        what = f"{field} = {value[:20]}"
    else:
        what = _spoil(random, path, place)
    arguments = ["plan", "b", "--devices", "devices.toml", "--device", random.choice(["mine", "pi5-8gb", "x"])]
    return Case("devices", what, (Step(command(*arguments)),))


def _plan_file(random: Random, place: Place, seeds: Seeds) -> Case:
    """A plan instead of a profile, for compare."""
    path = place.cwd / "plan.json"
    shutil.copyfile(seeds.plan(), path)
    what = _spoil(random, path, place)
    return Case("plan", what, (Step(command("compare", "--plan", "plan.json", "-o", "o"), writes=("o",)),))


def _pairs(random: Random, place: Place, seeds: Seeds) -> Case:
    """Pairs of sentences, and gates on them."""
    _bundle(place, seeds)
    path = place.cwd / "pairs.json"
    pair = {"a": "once upon a time he was", "b": "once upon a time she was", "kind": "gender"}
    changed, what = mutate.edit(random, pair)
    lines = [json.dumps(pair).encode(), mutate.json_bytes(changed)]
    random.shuffle(lines)
    path.write_bytes(b"\n".join(lines))
    if random.random() < 0.3:
        data, what = mutate.raw(random, path.read_bytes())
        path.write_bytes(data)
    elif random.random() < 0.1:
        what = replace(random, path, random.choice(["/dev/zero", "../../canary/.ssh/id", "."]))
    gate: list[str] = []
    if random.random() < 0.3:
        limits = ["gender: drift <= 0.1", "x: acc_fall <= 0.02", "gap <= 0.1", ": <= 1", "a: b: c <= 1", "é: acc <= 1"]
        (place.cwd / "g.txt").write_text(random.choice(limits))
        gate = ["--gate", "g.txt"]
    arguments = ["eval", "b", "--text", "text.txt", "--max-tokens", "64", "--pairs", "pairs.json", *gate]
    return Case("pairs", what, (Step(command(*arguments)),))


def _endpoint(random: Random, place: Place, seeds: Seeds) -> Case:
    shutil.copytree(seeds.profile(), place.cwd / "p")
    record = {
        "url": "http://x",
        "model": "m",
        "levels": [{"concurrency": 1, "requests": 4, "ttft_s": [0.1], "decode_tokens_per_s": [10.0]}],
        "version": 1,
    }
    path = place.cwd / "endpoint.json"
    path.write_text(json.dumps(record))
    what = _spoil(random, path, place)
    return Case(
        "endpoint", what, (Step(command("compare", "p", "-o", "o", "--measurement", "endpoint.json"), writes=("o",)),)
    )


def _places(random: Random, place: Place, seeds: Seeds) -> Case:
    """Outputs onto what is there already."""
    _bundle(place, seeds)
    shutil.copytree(seeds.checkpoint("olmoe"), place.cwd / "c")
    target = random.choice(
        [
            "../canary/Documents",
            "../canary",
            "text.txt",
            "/dev/null",
            "b",
            "c",
            "",
            ".",
            "..",
            "b/x",
            "nowhere/x/y",
            "link",
            "x" * 300,
            "/proc/x",
            "full\x1b",
            "../canary/empty/new",
        ]
    )
    (place.cwd / "link").symlink_to("../canary/Documents")
    writes = ("nowhere", "x" * 300, "full\x1b", "full\x1b.json", "b/x", "b/x.json")
    arguments = random.choice(
        [
            ["quantize", "b", "-o", target],
            ["export-portable", "b", "-o", target],
            ["export", "c", "-o", target],
            ["run", "b", "--prompt", "x", "--max-tokens", "2", "--trace", target],
        ]
    )
    replaced = {"export": ("b",), "quantize": ("b",), "run": ("text.txt",)}  # a bundle by a bundle, a file by a trace
    writes = (*writes, *replaced.get(arguments[0], ()))
    heavy = arguments[0] != "run"
    if target == "../canary/empty/new":  # a place of the user's choice
        arguments[arguments.index(target)] = "new"
        writes = (*writes, "new", "new.npy", "new.json", "new.data", "new.npy.json")
    return Case(
        "outputs", f"{arguments[0]} onto {target[:40]!r}", (Step(command(*arguments, heavy=heavy), writes=writes),)
    )


_KINDS: dict[str, tuple[int, Callable[[Random, Place, Seeds], Case]]] = {
    "run options": (25, _run_options),
    "options": (30, _other_options),
    "trace": (10, _trace_file),
    "profile": (10, _profile_file),
    "texts": (10, _text_file),
    "prices": (6, _prices),
    "endpoint": (4, _endpoint),
    "devices": (4, _devices),
    "plan": (4, _plan_file),
    "pairs": (4, _pairs),
    "outputs": (5, _places),
}
