"""Reads two facts of a saved ONNX model without the onnx package: where its initializers' bytes are, which it can
change too, and how exactly its quantized products are computed. Others read and change graphs by the same means.

Importing onnx for them would add 15 MB to every process. Field numbers are those of onnx.proto (ModelProto.graph = 7,
GraphProto.node = 1, .initializer = 5; NodeProto.op_type = 4, .attribute = 5; AttributeProto.name = 1, .i = 3, .g = 6;
TensorProto.dims = 1, .data_type = 2, .name = 8, .raw_data = 9, .external_data = 13, .data_location = 14;
StringStringEntryProto.key = 1, .value = 2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INTEGERS = {6, 7}  # TensorProto.DataType of int32 and int64
_MOST_INLINE = 512  # bytes


class Span(NamedTuple):
    """Bytes of the external data file: `packed` ones replace those of the initializer they were made from."""

    initializer: str
    offset: int
    nbytes: int
    packed: bool


class PlainTensor(NamedTuple):
    """An initializer that is used as it is stored: its place in the external data file, its ONNX type and shape."""

    name: str
    offset: int
    onnx_type: int
    shape: tuple[int, ...]


def plain_tensors(model: bytes) -> list[PlainTensor]:
    """The initializers of the main graph whose external data has not been packed."""
    found: list[PlainTensor] = []
    for graph in fields(memoryview(model), 7):
        for initializer in fields(graph, 5):
            entries = {text(entry, 1): text(entry, 2) for entry in fields(initializer, 13)}
            if "offset" in entries and not any(key.startswith("prepacked_") for key in entries):
                kind, shape = next(integers(initializer, 2), 0), tuple(integers(initializer, 1))
                found.append(PlainTensor(text(initializer, 8), int(entries["offset"]), kind, shape))
    return found


def external_spans(model: bytes) -> list[Span]:
    """The external data of every initializer of the main graph, in file order.

    A packed initializer has one span for each packed buffer; its plain bytes are dead once a session exists.
    Raises ValueError for weights that are stored inside the model: all but small integers.
    """
    spans: list[Span] = []
    for graph in fields(memoryview(model), 7):
        for initializer in fields(graph, 5):
            name = text(initializer, 8)
            entries = {text(entry, 1): text(entry, 2) for entry in fields(initializer, 13)}
            if "offset" not in entries:
                if next(integers(initializer, 2), 0) in _INTEGERS:
                    continue
                raise ValueError(f"initializer {name} has no external data")
            spans.extend(_packed_spans(name, entries) or [_plain_span(name, entries)])
    return sorted(spans, key=lambda span: span.offset)


def with_integers_inline(model: bytes, data: bytes) -> bytes:
    """The model with its small external constants of type int32 and int64 moved into it from `data`, its data file.

    They are axes, bounds and shapes: ONNX Runtime infers shapes from them, and looks for them in the model alone.
    """

    def initializer(message: memoryview) -> bytes:
        entries = {text(entry, 1): text(entry, 2) for entry in fields(message, 13)}
        nbytes = int(entries.get("length", 0))
        small = "offset" in entries and nbytes <= _MOST_INLINE and next(integers(message, 2), 0) in _INTEGERS
        if not small or any(key.startswith("prepacked_") for key in entries):
            return bytes(message)
        offset = int(entries["offset"])
        if offset + nbytes > len(data):
            raise ValueError(f"initializer {text(message, 8)} lies beyond its data file")
        kept = (field for number, field, _ in walk(message) if number not in (9, 13, 14))
        return b"".join([*kept, encoded(9, data[offset : offset + nbytes])])

    return rewritten(memoryview(model), 7, lambda graph: rewritten(graph, 5, initializer))


def with_offsets(model: bytes, moved: Callable[[int], str]) -> bytes:
    """The model with the external data of its main graph's initializers, plain and packed, at `moved(offset)`.

    That is a number in decimal, which may begin with zeros.
    """

    def entry(message: memoryview) -> bytes:
        key, value = text(message, 1), text(message, 2)
        if key == "offset":
            value = moved(int(value))
        elif key.startswith("prepacked_"):
            name, *buffers = value.split("|")
            parts = (buffer.split(";") for buffer in buffers)
            value = "|".join([name, *(";".join([moved(int(offset)), *rest]) for offset, *rest in parts)])
        return rewritten(message, 2, lambda _: value.encode())

    def initializer(message: memoryview) -> bytes:
        return rewritten(message, 13, entry)

    return rewritten(memoryview(model), 7, lambda graph: rewritten(graph, 5, initializer))


def accuracy_levels(model: bytes) -> set[int]:
    """The accuracy levels of the model's MatMulNBits nodes, those in branches included; 0 where none is said."""
    return {level for graph in fields(memoryview(model), 7) for level in _levels(graph)}


def with_accuracy_level(model: bytes, level: int) -> bytes:
    """The model with that accuracy level wherever a node says one, those in branches included."""

    def attribute(message: memoryview) -> bytes:
        if text(message, 1) != "accuracy_level":
            return rewritten(message, 6, graph)
        return b"".join(encoded(3, level) if number == 3 else field for number, field, _ in walk(message))

    def graph(message: memoryview) -> bytes:
        return rewritten(message, 1, lambda node: rewritten(node, 5, attribute))

    return rewritten(memoryview(model), 7, graph)


def _levels(graph: memoryview) -> Iterator[int]:
    for node in fields(graph, 1):
        level = 0
        for attribute in fields(node, 5):
            if text(attribute, 1) == "accuracy_level":
                level = next(integers(attribute, 3), 0)
            for branch in fields(attribute, 6):
                yield from _levels(branch)
        if text(node, 4) == "MatMulNBits":
            yield level


def _plain_span(name: str, entries: dict[str, str]) -> Span:
    return Span(name, int(entries["offset"]), int(entries["length"]), packed=False)


def _packed_spans(name: str, entries: dict[str, str]) -> list[Span]:
    """`prepacked_N` = key "|" offset ";" length ";" padding, repeated for each buffer of the packed weight."""
    spans: list[Span] = []
    for key, value in entries.items():
        if key.startswith("prepacked_"):
            for buffer in value.split("|")[1:]:
                offset, nbytes, _padding = buffer.split(";")
                spans.append(Span(name, int(offset), int(nbytes), packed=True))
    return spans


def text(message: memoryview, number: int) -> str:
    """The first string of that number in a protobuf message; empty where there is none."""
    return bytes(next(fields(message, number), memoryview(b""))).decode()


def fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The length-delimited fields of that number in a protobuf message."""
    return (value for found, _, value in walk(message) if found == number and isinstance(value, memoryview))


def integers(message: memoryview, number: int) -> Iterator[int]:
    """The variable-length integers of that number in a protobuf message."""
    return (value for found, _, value in walk(message) if found == number and isinstance(value, int))


def rewritten(message: memoryview, number: int, change: Callable[[memoryview], bytes]) -> bytes:
    """The message with its length-delimited fields of that number changed."""
    parts: list[bytes | memoryview] = []
    for found, field, value in walk(message):
        if found == number and isinstance(value, memoryview):
            parts.append(encoded(number, change(value)))
        else:
            parts.append(field)
    return b"".join(parts)


def walk(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview | int | None]]:
    """Each field of a protobuf message: its number, its bytes as they are, its value unless it is of fixed length.

    Raises ValueError where the message is cut short, or is not one that protobuf itself would read the same way.
    """
    position, end = 0, len(message)
    while position < end:
        start, value = position, None
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == _BYTES:
            nbytes, position = _varint(message, position)
            value = message[position : position + nbytes]
            position += nbytes
        elif kind == _VARINT:
            value, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"protobuf wire type {kind}")
        if position > end or not 8 <= tag < 1 << 32:
            raise ValueError("no protobuf message, or one that is cut short")
        yield tag >> 3, message[start:position], value


def encoded(number: int, value: float | str | bytes) -> bytes:
    """One field of a protobuf message: a whole number of at least 0, a float32, a text, or a message's bytes."""
    if isinstance(value, int):
        return _to_varint(number << 3 | _VARINT) + _to_varint(value)
    if isinstance(value, float):
        return _to_varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    data = value.encode() if isinstance(value, str) else value
    return _to_varint(number << 3 | _BYTES) + _to_varint(len(data)) + data


def _to_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    try:
        byte = message[position]
        if byte < 0x80:  # nearly all
            return byte, position + 1
        value, shift = byte & 0x7F, 7
        while byte >= 0x80 and shift < 70:
            position += 1
            byte = message[position]
            value |= (byte & 0x7F) << shift
            shift += 7
    except IndexError:
        raise ValueError("a protobuf number is cut short") from None
    if byte >= 0x80:
        raise ValueError("a protobuf number has more than 64 bits")
    return value, position + 1
