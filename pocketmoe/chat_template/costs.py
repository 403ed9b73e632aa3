"""What each filter, test and method of a chat template costs, known before it runs.

A cost is a function of the meter and the arguments (the filtered value, or the method's object, first). It counts the
steps and returns an upper bound of the bytes of the result. What has no entry counts as if it multiplied all of its
arguments, so that a filter or method that nobody thought of is refused where it could be large.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (a template computes with values of any kind: isinstance tells a container's class, never what is in it)

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pocketmoe.chat_template.meter import Meter

Cost = Callable[[Meter, Sequence[Any]], int]

WRITTEN = 12  # characters of a value's repr or JSON for each byte of it, at most (\\U0001f600, \\u0000)
_LINEAR = 16  # bytes of a result for each byte of the arguments: upper case, escapes, wider characters
_OBJECT = 100  # bytes of an object of its own, with the reference to it
_NUMBER = re.compile(r"\d+")


def _constant(meter: Meter, args: Sequence[Any]) -> int:
    """An answer of fixed size, or one of the arguments."""
    del args
    meter.work(1)
    return 0


def _looked_up(meter: Meter, args: Sequence[Any]) -> int:
    """A key is hashed; what is found existed before."""
    meter.work(1 + meter.total(args[1:]).nodes)
    return 0


def linear(meter: Meter, args: Sequence[Any]) -> int:
    """Each byte is looked at once."""
    size = meter.total(args)
    meter.work(size.nodes + size.nbytes // 1024)
    return 256 + _LINEAR * size.nbytes


def written(meter: Meter, args: Sequence[Any]) -> int:
    """The arguments become text."""
    size = meter.total(args)
    meter.work(size.nodes + size.nbytes // 256)
    return 256 + WRITTEN * size.nbytes


def _listed(meter: Meter, args: Sequence[Any]) -> int:
    """A text becomes a list of characters; a list stays one."""
    length = len(args[0]) if args and isinstance(args[0], str | bytes | bytearray) else 0
    meter.work(length)
    return _OBJECT * length + linear(meter, args)


def _split(meter: Meter, args: Sequence[Any]) -> int:
    """As many pieces as the text has separators."""
    size = meter.total(args)
    text, between = args[0], args[1] if len(args) > 1 else None
    if isinstance(text, str) and isinstance(between, str) and between:
        pieces = text.count(between) + 1
    else:
        pieces = _length(text) // 2 + 1
    meter.work(size.nbytes // 256 + 1)
    return _OBJECT * pieces + 4 * size.nbytes


def _searched(meter: Meter, args: Sequence[Any]) -> int:
    """Searching from the end compares what is sought at every place."""
    sought = max((len(arg) for arg in args[1:] if isinstance(arg, str | bytes)), default=0)
    meter.work(meter.size(args[0]).nbytes * sought // 1024)
    return _split(meter, args)


def _padded(meter: Meter, args: Sequence[Any]) -> int:
    """As wide as the numbers say."""
    bound = linear(meter, args) + 8 * _numbers(args)
    meter.work(bound // 1024)
    return bound


def _tabs_expanded(meter: Meter, args: Sequence[Any]) -> int:
    tabs = args[0].count("\t") if isinstance(args[0], str) else _length(args[0])
    return linear(meter, args) + 4 * tabs * max(8, _numbers(args))


def _replaced(meter: Meter, args: Sequence[Any]) -> int:
    """The new text at every place where the old one stands."""
    bound = written(meter, args)
    if len(args) < 3:
        return bound
    text, old, new = args[:3]
    if isinstance(text, str) and isinstance(old, str):
        places = text.count(old)
    else:
        places = 1 + WRITTEN * meter.size(text).nbytes
    longer = meter.size(new).nbytes * (1 if isinstance(new, str) else WRITTEN)
    meter.work(places * longer // 1024)
    return bound + 4 * places * longer


def _joined(meter: Meter, args: Sequence[Any]) -> int:
    """The separator between all of the items."""
    return written(meter, args) + _separated(meter, args[0], args[1:])


def _joined_by(meter: Meter, args: Sequence[Any]) -> int:
    return written(meter, args) + _separated(meter, args[1] if len(args) > 1 else (), args[:1])


def _separated(meter: Meter, items: Any, separators: Sequence[Any]) -> int:
    bound = 4 * _length(items) * WRITTEN * meter.total(separators).nbytes if separators else 0
    meter.work(bound // 4096)
    return bound


def _indented(meter: Meter, args: Sequence[Any]) -> int:
    """So many characters before each line."""
    lines = len(args[0].splitlines()) + 1 if isinstance(args[0], str) else 1
    width = _numbers(args[1:]) + 4 + sum(len(arg) for arg in args[1:] if isinstance(arg, str))
    bound = linear(meter, args) + 4 * lines * width
    meter.work(lines + bound // 1024)
    return bound


def formatted(meter: Meter, args: Sequence[Any]) -> int:
    """printf's way: each field may hold all of the values, and be as wide as any number says."""
    if not isinstance(args[0], str | bytes | bytearray):
        return linear(meter, args)
    text = args[0] if isinstance(args[0], str) else args[0].decode("latin-1")
    fields = text.count("%")
    wide = sum(int(digits) if len(digits) < 16 else 1 << 60 for digits in _NUMBER.findall(text))
    if "*" in text:
        wide += fields * _numbers(_flat(args[1:]))
    bound = 256 + 4 * (len(text) + wide) + fields * WRITTEN * meter.total(args[1:]).nbytes
    meter.work(fields + meter.size(text).nbytes // 1024 + bound // 4096)
    return bound


def _as_json(meter: Meter, args: Sequence[Any]) -> int:
    """Every item may stand on a line of its own, behind its indentation and between separators."""
    size = meter.size(args[0]) if args else meter.total(args)
    around = 16 + _numbers(args[1:]) + WRITTEN * meter.total(args[1:]).nbytes
    meter.work(size.nodes)
    return written(meter, args[:1]) + (size.nodes * around * (size.depth + 1) if len(args) > 1 else 16 * size.nodes)


def _sorted(meter: Meter, args: Sequence[Any]) -> int:
    """Compared about log n times, by copies in lower case."""
    size = meter.total(args)
    meter.work(max(1, size.nodes.bit_length()) * (size.nodes + size.nbytes // 1024))
    return _listed(meter, args)


def _summed(meter: Meter, args: Sequence[Any]) -> int:
    """Adding lists copies what was added before."""
    bound = linear(meter, args)
    if not all(isinstance(item, int | float) for item in _flat(args[:1])):
        meter.work(_length(args[0]) * meter.size(args[0]).nbytes // 4096)
    return bound


def _quadratic(meter: Meter, args: Sequence[Any]) -> int:
    """Each byte may lead to a look at all others."""
    bound = written(meter, args)
    meter.work(1 + bound * bound // (1 << 16))
    return bound + unknown(meter, args)


def _dated(meter: Meter, args: Sequence[Any]) -> int:
    """The C library's strftime makes at most 256 characters of one."""
    bound = 1024 * (1 + meter.total(args).nbytes)
    meter.work(bound // 256)
    return bound


def _translated(meter: Meter, args: Sequence[Any]) -> int:
    return linear(meter, args) + math.prod(1 + meter.size(arg).nbytes for arg in args)


def unknown(meter: Meter, args: Sequence[Any]) -> int:
    """As if it multiplied everything: numbers are taken for widths and counts."""
    bound = 64
    for arg in args:
        bound *= 1 + (abs(arg) if isinstance(arg, int) else meter.size(arg).nbytes)
    meter.work(1 + min(bound, 1 << 60) // 64)
    return bound


def _numbers(args: Sequence[Any]) -> int:
    return sum(abs(arg) for arg in args if isinstance(arg, int))


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments, and the items of those that hold some."""
    flat: list[Any] = []
    for arg in args:
        flat += arg.values() if isinstance(arg, dict) else arg if isinstance(arg, list | tuple) else [arg]
    return flat


def _length(value: Any) -> int:
    return len(value) if hasattr(type(value), "__len__") else 1


def _table(costs: dict[Cost, str]) -> dict[str, Cost]:
    return {name: cost for cost, names in costs.items() for name in names.split()}


FILTERS = _table(
    {
        _constant: "attr count d default first last length map random reject rejectattr select selectattr items safe",
        linear: "abs capitalize float int lower max min reverse title trim truncate upper wordcount",
        written: "string e escape filesizeformat forceescape urlencode xmlattr",
        _listed: "list unique",
        _sorted: "dictsort groupby sort",
        _padded: "batch center",
        _replaced: "replace",
        _joined: "join",
        _indented: "indent",
        formatted: "format",
        _as_json: "tojson",
        _summed: "sum",
        _quadratic: "pprint striptags urlize wordwrap",
    }
)
TESTS = _table(
    {
        _constant: "boolean callable defined divisibleby escaped even false filter float integer iterable mapping none"
        " number odd sameas sequence string test true undefined",
        linear: "!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lower lt ne upper",
    }
)
METHODS = _table(
    {
        _constant: "items keys values bit_length bit_count conjugate is_integer reset next cycle format format_map",
        _looked_up: "get",
        linear: "capitalize casefold count endswith find fromhex hex index isalnum isalpha isascii isdecimal isdigit"
        " isidentifier islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix"
        " removesuffix rstrip startswith strip swapcase title upper changed",
        _split: "split splitlines",
        _searched: "rfind rindex rpartition rsplit",
        _padded: "center ljust rjust zfill",
        _tabs_expanded: "expandtabs",
        _replaced: "replace",
        _joined_by: "join",
        _translated: "translate fromkeys",
        _quadratic: "encode decode striptags unescape",
    }
)
FUNCTIONS = _table(
    {
        _constant: "range",
        linear: "namespace dict cycler joiner",
        written: "raise_exception",
        _dated: "strftime_now",
    }
)
