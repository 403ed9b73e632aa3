"""Changes to JSON, texts and bytes that somebody could make by malice or by accident."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

_NUMBERS = (
    -1,
    0,
    1,
    2,
    3,
    7,
    255,
    2**31 - 1,
    2**31,
    2**40,
    2**53,
    2**63,
    10**30,
    -(2**31),
    -(2**63),
    0.5,
    1e-320,
    1e308,
)
_FLOATS = (float("nan"), float("inf"), float("-inf"))
_TEXTS = (
    "",
    " ",
    "x",
    "../../canary/.ssh/id",
    "/etc/passwd",
    "a\x00b",
    "\x1b[31m",
    "é" * 50,
    "\ud800",
    "<s>",
    "x" * 100_000,
)


def deep(levels: int = 20_000, kind: str = "[") -> str:
    """JSON nested so deep that a recursive reader gives up."""
    return (
        kind * levels + {"[": "]", '{"a":': "}"}[kind] * levels if kind == "[" else kind * levels + "1" + "}" * levels
    )


def value(random: Random) -> Any:
    """A value of a type and size that nobody expects."""
    return random.choice(
        [
            None,
            True,
            False,
            [],
            {},
            [[]],
            {"": None},
            [None],
            ["x", 1],
            {"a": {"b": [1]}},
            random.choice(_NUMBERS),
            random.choice(_NUMBERS),
            random.choice(_FLOATS),
            random.choice(_TEXTS),
            random.choice(_TEXTS),
            list(range(300)),
        ]
    )


def paths(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of every value below a JSON document."""
    found = []
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, inner in items:
        found += [(*prefix, key), *paths(inner, (*prefix, key))]
    return found


def get(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def edit(random: Random, document: Any, under: tuple[tuple[Any, ...], ...] = ((),)) -> tuple[Any, str]:
    """A copy with one value changed, and what was done. `under`: only below one of these paths."""
    document = copy.deepcopy(document)
    top = random.choice(under)
    choices = paths(get(document, top), top)
    if not choices:
        return document, "nothing"
    shallow = [path for path in choices if len(path) <= len(top) + 2]
    path = random.choice(random.choice([choices, shallow]))
    holder, key = get(document, path[:-1]), path[-1]
    old = holder[key]
    name = ".".join(map(str, path))
    match random.randrange(8):
        case 0:
            del holder[key]
            return document, f"{name} removed"
        case 1 if isinstance(holder, dict):
            holder[f"{key}_"] = holder.pop(key)
            return document, f"{name} renamed"
        case 2 if isinstance(old, int | float) and not isinstance(old, bool):
            new = random.choice([old + 1, old - 1, -old, old * 2, old * 1000, float(old), str(old)])
        case 3 if isinstance(old, list) and old:
            new = random.choice([old[:-1], old * 2, old[::-1], [*old, old[0]], old[:1] * 1000])
        case 4 if isinstance(old, str):
            new = random.choice([old + "x", old[:-1], old.upper(), [old], {"content": old}, old * 1000])
        case _:
            new = value(random)
    holder[key] = new
    return document, f"{name}: {shown(old)} -> {shown(new)}"


def shown(what: Any) -> str:
    text = json.dumps(what)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def raw(random: Random, data: bytes) -> tuple[bytes, str]:
    """Bytes with one damage, whatever they are."""
    n = len(data)
    at = random.randrange(max(n, 1))
    match random.randrange(9):
        case 0:
            return data[:at], f"cut at byte {at} of {n}"
        case 1:
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[
                at + 1 :
            ] if n else b"x", f"bit at {at}"
        case 2:
            return b"", "emptied"
        case 3:
            return data[:at] + b"\xff\xfe\xc0" + data[at:], f"bytes that are not UTF-8 at {at}"
        case 4:
            return b"\xef\xbb\xbf" + data, "a byte order mark"
        case 5:
            return data + data, "twice"
        case 6:
            return data[:at] + bytes(random.randrange(1, 64)) + data[at:], f"zeros at {at}"
        case 7:
            length = random.randrange(1, 200)
            return data[:at] + random.randbytes(length) + data[at + length :], f"{length} random bytes at {at}"
        case _:
            kind = random.choice(["[", '{"a":'])
            return deep(kind=kind).encode(), f"{kind} nested deep"


def json_bytes(document: Any, indent: int | None = None) -> bytes:
    """As Python writes JSON, NaN and lone surrogates included."""
    return json.dumps(document, indent=indent).encode()
